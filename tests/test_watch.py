"""What is told of training while it goes on, by a trainer that only calls back."""

from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import PrinterCallback

from delib.training import processes, watch


class Trainer:
    """Three steps, each with its log, from the checkpoint that it is given on."""

    def __init__(self, logs):
        self.logs, self.callbacks, self.resumed = logs, [PrinterCallback()], None

    def remove_callback(self, kind):
        self.callbacks = [one for one in self.callbacks if not isinstance(one, kind)]

    def add_callback(self, callback):
        self.callbacks.append(callback)

    def train(self, resume_from_checkpoint):
        self.resumed = resume_from_checkpoint
        for logs in self.logs:
            for callback in self.callbacks:
                callback.on_log(None, None, None, logs=logs)
                callback.on_step_end(None, None, None)


@pytest.fixture
def told(monkeypatch):
    """What the bar was asked to show, in order."""
    found = []

    class Ticker:
        def step(self):
            found.append("step")

        def note(self, text):
            found.append(text)

    @contextmanager
    def bar(what, total, done):
        found.append((what, total, done))
        yield Ticker()
        found.append("end")

    monkeypatch.setattr(watch, "bar", bar)
    return found


def test_the_bar_begins_at_the_checkpoint_and_shows_reward_or_loss(told):
    trainer = Trainer([{"loss": 2.0}, {"loss": 1.5, "reward": 0.25}, {"reward": None, "loss": 1.0}, {"epoch": 1}])
    watch.train(trainer, "rl", 9, Path("trainer/checkpoint-5"))
    assert trainer.resumed == "trainer/checkpoint-5"
    notes = ["loss 2.000", "step", "reward 0.250", "step", "loss 1.000", "step", "step"]
    assert told == [("rl", 9, 5), *notes, "end"]
    assert len(trainer.callbacks) == 1, "and nothing else prints the logs"
    begun = Trainer([{"loss": 0.0}])
    told.clear()
    watch.train(begun, "sft", 1, None)
    assert begun.resumed is None and told == [("sft", 1, 0), "loss 0.000", "step", "end"]


def test_a_process_that_does_not_lead_shows_nothing(told, monkeypatch):
    monkeypatch.setattr(processes, "leads", lambda: False)
    trainer = Trainer([{"loss": 2.0}])
    watch.train(trainer, "sft", 9, Path("trainer/checkpoint-5"))
    assert trainer.resumed == "trainer/checkpoint-5" and told == [] and trainer.callbacks == []
