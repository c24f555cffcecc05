"""Rollouts of RL: what llama.cpp samples with the current weights, and the journal that outlives a kill."""

import asyncio
import hashlib
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROWS
from delib import recipe
from delib.errors import StageError
from delib.models import weights
from delib.recipe import RlSection
from delib.records import Message, Prompt, Sample, Verdict
from delib.run import StageFolder
from delib.stages import rl
from delib.training import llamacpp, rollouts
from delib.training.rollouts import Journal
from test_rl import BARE, POLICY, one_thread, opened  # noqa: F401 - a fixture that is used by itself


def prompts_of_rows():
    return [
        Prompt(id=name, messages=[Message(role="user", content=text)], category=about, clause=clause, behaviour=kind)
        for name, text, about, clause, kind in ROWS
    ]


class HashJudge:
    """A score of its own for each answer, and one failure in ten."""

    name, fails_above = "hash", 0.9

    def __init__(self) -> None:
        self.shown = []

    async def grade(self, prompt, completion, view, runs):
        self.shown.append((prompt.id, completion.answer))
        drawn = hashlib.sha256(completion.answer.encode()).digest()[0] / 256
        fails = drawn > self.fails_above
        made = Verdict(
            score=None if fails else drawn,
            behaviour="comply",
            criteria={},
            reason="",
            view=view,
            judge=self.name,
            sent=completion.answer,
            failure="nobody answers" if fails else None,
        )
        return [made] * runs


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory, tiny_model):
    """A tiny model with larger weights, so that quantising them shows, and a merge in its vocabulary, without which
    llama.cpp takes none."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["model"]["vocab"] |= {"th": 258}
    rules["model"]["merges"] = [["t", "h"]]
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(tiny_model)
    config.vocab_size = 259
    model = LlamaForCausalLM(config)
    for name, value in model.named_parameters():
        if value.dim() > 1:
            torch.nn.init.normal_(value, std=0.3 if "embed" in name else 0.15)
    model.generation_config.eos_token_id = [1, *range(60, 80)]
    model.save_pretrained(folder)
    return folder


def test_the_server_writes_with_the_current_weights_and_tells_their_probabilities(wide_model, tmp_path):
    """What llama.cpp sampled, scored by transformers with the trained weights: nearly the same log-probabilities, and
    with the weights from before they were trained not."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(wide_model)
    model = AutoModelForCausalLM.from_pretrained(wide_model)
    before = AutoModelForCausalLM.from_pretrained(wide_model)
    weights.freeze(model, 1)
    file = llamacpp.LiveGguf(wide_model, model, tmp_path / "weights.gguf")
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad and value.dim() > 1:
                value.add_(torch.randn_like(value) * 0.1)

    class Trainer:
        state = type("State", (), {"global_step": 3})
        accelerator = type("Accelerator", (), {"unwrap_model": staticmethod(lambda model: model)})

    Trainer.model = model
    names, begun = ["a"] * 4 + ["b"] * 4, []

    async def grade(step, place, name, sent, ids):
        begun.append((step, place, name, sent, len(journal.made)))

    def rollout(journal):
        return llamacpp.by_server(
            tokenizer,
            lambda step: names,
            journal,
            file,
            asyncio.run,
            grade,
            ends={1},
            context_tokens=128,
            max_tokens=40,
            temperature=0.7,
            seed=1,
        )

    journal = Journal(tmp_path, 0)
    prompts = ["<|im_start|>Why?"] * 4 + ["<|im_start|>And what then?"] * 4
    made = rollout(journal)(prompts, Trainer)
    assert len({tuple(ids) for ids in made["completion_ids"]}) == 8, "each has a seed of its own"
    assert sorted(place for _, place, *_ in begun) == list(range(8))
    assert min(count for *_, count in begun) < 8, "grading begins before the last is written"

    def apart(scorer):
        found = []
        for sent, ids, told in zip(made["prompt_ids"], made["completion_ids"], made["logprobs"], strict=True):
            with torch.no_grad():
                odds = (scorer(torch.tensor([sent + ids])).logits[0, len(sent) - 1 : -1] / 0.7).log_softmax(-1)
            found += [abs(odds[n, i].item() - t) for n, (i, t) in enumerate(zip(ids, told, strict=True)) if t]
        return sum(found) / len(found)

    known = [t is not None for told in made["logprobs"] for t in told]
    assert sum(known) / len(known) > 0.4, "a byte-level model ends within characters more than a real one"
    assert apart(model) < 0.05 < 0.3 < apart(before)
    file.target.unlink()
    again = Journal(tmp_path, 0)
    assert rollout(again)(prompts, Trainer) == made, "what was written stands in the journal, and no server starts"
    assert rollout(Journal(tmp_path, 3))(prompts, Trainer) == made
    assert Journal(tmp_path, 4).made == {}, "the checkpoint holds these steps"


def test_probabilities_are_told_of_whole_characters_only():
    tokens = [7, 8, 8, 9, 9]
    told = [{"id": 7, "prob": 0.5}, {"id": 8, "prob": 0.25}, {"id": 9, "prob": 1.0}]
    assert llamacpp.aligned(tokens, told) == [pytest.approx(math.log(0.5)), None, math.log(0.25), None, 0.0]
    assert llamacpp.aligned([7], []) == [None]


class Killed(Exception):
    """Stands for kill -9: nothing of ours catches it, and what is on disk is all that is left."""


class DyingJudge(HashJudge):
    def __init__(self, after: int, fails_above: float = 0.9) -> None:
        super().__init__()
        self.after, self.fails_above = after, fails_above

    async def grade(self, prompt, completion, view, runs):
        if len(self.shown) == self.after:
            raise Killed
        return await super().grade(prompt, completion, view, runs)


@pytest.mark.parametrize("writer", ["transformers", "llamacpp"])
def test_after_a_kill_nothing_is_written_or_graded_again(wide_model, tmp_path, writer):
    section = RlSection(
        steps=6, prompts=2, group=4, max_tokens=24, learning_rate=1e-3, checkpoint_steps=2, rollouts=writer
    )
    given = recipe.Recipe(sft=BARE, rl=section)
    steps = {}
    for name in ("whole", "broken"):
        judge = HashJudge()
        if name == "broken":
            judges = [DyingJudge(after) for after in (3, steps["whole"] * 6 // 10, 1)]
            for dying in judges:
                with pytest.raises(Killed):
                    rl.run(given, prompts_of_rows(), opened(dying), POLICY, wide_model, StageFolder(tmp_path / name))
            assert weights.last_checkpoint(tmp_path / name / "trainer") is not None
            before = (tmp_path / name / "records.jsonl").read_text().splitlines()
        made = rl.run(given, prompts_of_rows(), opened(judge), POLICY, wide_model, StageFolder(tmp_path / name))
        steps[name] = len(judge.shown) + (sum(len(j.shown) for j in judges) if name == "broken" else 0)
        steps[f"{name} curve"] = {h["step"]: h["loss"] for h in made.detail["curve"]}
        steps[f"{name} monitor"] = [h["monitor"] for h in made.detail["curve"]]
        rows = StageFolder(tmp_path / name).records(Sample)
        assert [s.index for s in rows] == list(range(6 * 8))
    graded = sum(bool(s.verdicts) for s in rows)
    assert steps["broken"] == graded > 20, "each was graded once over all tries"
    after = (tmp_path / "broken" / "records.jsonl").read_text().splitlines()
    assert set(before) <= set(after), "what was graded before stands"
    assert made.detail["resumed_from"] is not None
    if writer == "transformers":  # the server's completions depend on which of them decode side by side
        assert steps["broken curve"] == pytest.approx(steps["whole curve"], rel=1e-5, abs=1e-9)
        assert any(abs(loss) > 1e-4 for loss in steps["whole curve"].values())
        assert (tmp_path / "broken" / "records.jsonl").read_bytes() == (
            tmp_path / "whole" / "records.jsonl"
        ).read_bytes()
        assert steps["broken monitor"] == steps["whole monitor"]
    else:
        assert all(0.5 < h["importance"] < 1.5 for h in made.detail["curve"] if "importance" in h)
        assert any("importance" in h for h in made.detail["curve"])


def test_vllm_writes_through_trl_and_its_rollouts_are_kept(wide_model, tmp_path, monkeypatch):
    """A stand-in where TRL opens vLLM; all else is TRL's: what it wrote is journalled with its log-probabilities,
    parted, weighted, and after a kill not written again."""
    import random

    from delib.training import fitting

    draw, opened_with, calls = random.Random(0), [], []

    class Vllm:
        def __init__(self, **given):
            opened_with.append(given)

        def sync_weights(self):
            calls.append("sync")

        def generate(self, prompts, images, num_generations, profiler):
            calls.append("generate")
            ids = [[draw.randint(2, 258) for _ in range(draw.randint(1, 20))] + [1] for _ in prompts]
            return prompts, ids, [[[-5.5 + draw.uniform(-0.4, 0.4)] for _ in row] for row in ids], None

    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", Vllm)
    section = RlSection(steps=2, prompts=2, group=4, max_tokens=24, rollouts="vllm")
    given, folder = recipe.Recipe(sft=BARE, rl=section), StageFolder(tmp_path)
    found = rl.problems(given)
    assert "vllm needs a GPU; set device: cuda" in found[0]
    monkeypatch.setattr(fitting, "rollouts", lambda _: [])
    with pytest.raises(Killed):
        rl.run(given, prompts_of_rows(), opened(DyingJudge(3)), POLICY, wide_model, folder)
    made = rl.run(given, prompts_of_rows(), opened(HashJudge()), POLICY, wide_model, folder)
    assert calls.count("generate") == 2, "one for each step, over both tries"
    assert calls[-2:] == ["sync", "generate"], "with the weights of its step"
    assert (opened_with[0]["mode"], opened_with[0]["temperature"]) == ("colocate", 1.0)
    rows = StageFolder(tmp_path / "trainer" / "rollouts").records(rollouts.Rollout)
    assert all(len(r.ids) == len(r.logprobs or []) for r in rows)
    samples = folder.records(Sample)
    assert len(samples) == 16
    assert all(0 < h["importance"] < 3 for h in made.detail["curve"] if "importance" in h)
    assert any("importance" in h for h in made.detail["curve"])


@pytest.fixture
def scored(monkeypatch):
    """Fills with the advantages of each step and which of its rows are learned from."""
    from delib.training import grpo

    seen, inner = [], grpo.trainer_class

    def watched(levers):
        class Watching(inner(levers)):
            def _generate_and_score_completions(self, inputs):
                made = super()._generate_and_score_completions(inputs)
                seen.append((made["advantages"].tolist(), made["completion_mask"].any(1).tolist()))
                return made

        return Watching

    monkeypatch.setattr(grpo, "trainer_class", watched)
    return seen


def test_what_is_cut_off_is_zero_for_the_siblings_advantage_too(wide_model, tmp_path, scored):
    """Through `run`: by default the advantages of those that ended are about each other alone."""
    section = RlSection(steps=1, prompts=2, group=8, max_tokens=16, scale_rewards="none")
    folder = StageFolder(tmp_path)
    rl.run(recipe.Recipe(sft=BARE, rl=section), prompts_of_rows(), opened(HashJudge()), POLICY, wide_model, folder)
    samples = folder.records(Sample)
    cut = [s.drop_reason == "cut off" for s in samples]
    assert 0 < sum(cut) < len(cut)
    [(advantages, learned)] = scored
    assert learned == [not c for c in cut]
    for group in (range(8), range(8, 16)):
        rewards = [samples[n].score for n in group if not cut[n] and samples[n].failure is None]
        given = [advantages[n] for n in group if not cut[n] and samples[n].failure is None]
        assert given == pytest.approx([r - sum(rewards) / len(rewards) for r in rewards], abs=1e-6)
    assert not any(a for a, c in zip(advantages, cut, strict=True) if c)


@pytest.fixture(scope="module")
def two_ends(tmp_path_factory, wide_model):
    """The wide model with a token `<|endoftext|>` that it writes often, beside the end of turn that it declares."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("ends")
    tokenizer = AutoTokenizer.from_pretrained(wide_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    model = AutoModelForCausalLM.from_pretrained(wide_model)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(0)
    with torch.no_grad():
        torch.nn.init.normal_(model.get_input_embeddings().weight[-1], std=0.8)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_what_the_server_ends_on_is_an_end(two_ends, tmp_path, scored):
    """llama.cpp knows `<|endoftext|>` by its text: such a completion was not cut off, is judged, and is learned from;
    after a kill too, when no server tells it again."""
    section = RlSection(steps=1, prompts=2, group=8, max_tokens=24, rollouts="llamacpp")
    given, folder = recipe.Recipe(sft=BARE, rl=section), StageFolder(tmp_path)
    with pytest.raises(Killed):
        rl.run(given, prompts_of_rows(), opened(DyingJudge(2)), POLICY, two_ends, folder)
    rl.run(given, prompts_of_rows(), opened(HashJudge()), POLICY, two_ends, folder)
    samples = folder.records(Sample)
    short = [s.completion.usage["completion"] < 24 for s in samples]
    written = [json.loads(line) for line in (tmp_path / "trainer/rollouts/records.jsonl").read_text().splitlines()]
    assert sum(row["ids"][-1] == 259 for row in written) > 2, "what the test is about"
    assert any(not s for s in short)
    assert [s.completion.finish != "length" for s, ended in zip(samples, short, strict=True) if ended] == [True] * sum(
        short
    )
    assert all("endoftext" not in s.completion.answer for s in samples)
    assert scored[-1][1] == short


def test_a_server_that_is_gone_stops_the_stage(two_ends, tmp_path, monkeypatch):
    """Its address answers no more: the stage's own error, with the cause, and no traceback of aiohttp's."""
    from delib.models import embedded

    monkeypatch.setattr(embedded, "started", lambda _: type("Gone", (), {"listening_address": "http://127.0.0.1:9"}))
    given = recipe.Recipe(sft=BARE, rl=RlSection(steps=1, prompts=2, group=2, max_tokens=16, rollouts="llamacpp"))
    with pytest.raises(StageError, match=r"the embedded server gave no answer.*ConnectorError"):
        rl.run(given, prompts_of_rows(), opened(HashJudge()), POLICY, two_ends, StageFolder(tmp_path))


ONCE = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from test_rollouts import *
torch.set_num_threads(1)

class Told(HashJudge):
    async def grade(self, *given):
        with open({log!r}, "a") as log:
            log.write("graded\\n")
        await asyncio.sleep(0.1)
        return await super().grade(*given)

section = RlSection(steps=6, prompts=2, group=4, max_tokens=24, learning_rate=1e-3, checkpoint_steps=2)
given = recipe.Recipe(sft=BARE, rl=section)
made = rl.run(given, prompts_of_rows(), opened(Told()), POLICY, Path({start!r}), StageFolder(Path({out!r})))
Path({out!r}, "losses.json").write_text(json.dumps([h["loss"] for h in made.detail["curve"]]))
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_step(wide_model, tmp_path):
    """Real processes, killed twice while they grade; what was in flight at a kill is graded again, and nothing else."""

    def start(name):
        (tmp_path / name).mkdir(exist_ok=True)
        tests = str(Path(__file__).parent)
        given = {"tests": tests, "log": str(tmp_path / f"{name}.log"), "start": str(wide_model)}
        code = ONCE.format(**given, out=str(tmp_path / name))
        with (tmp_path / f"{name}.out").open("a") as log:
            return subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)

    def lines(name):
        file = tmp_path / name
        return file.read_text().count("\n") if file.exists() else 0

    assert start("whole").wait() == 0, (tmp_path / "whole.out").read_text()
    total = lines("whole.log")
    for mark in (total // 3, total * 2 // 3):
        process = start("broken")
        while lines("broken.log") < mark:
            assert process.poll() is None, (tmp_path / "broken.out").read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start("broken").wait() == 0, (tmp_path / "broken.out").read_text()
    losses = [json.loads((tmp_path / name / "losses.json").read_text()) for name in ("whole", "broken")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-9)
    whole, broken = ((tmp_path / name / "records.jsonl").read_bytes() for name in ("whole", "broken"))
    assert whole == broken
    assert lines("broken.log") - total <= 2 * 8, "a step has eight completions"


def test_an_adapter_is_trained_and_merged(wide_model, tmp_path):
    import torch
    from safetensors.torch import load_file

    section = RlSection(
        steps=3, prompts=2, group=4, max_tokens=24, learning_rate=1e-2, lora={"rank": 2}, frozen_layers=1
    )
    made = rl.run(
        recipe.Recipe(sft=BARE, rl=section),
        prompts_of_rows(),
        opened(HashJudge()),
        POLICY,
        wide_model,
        StageFolder(tmp_path),
    )
    assert any(h["loss"] for h in made.detail["curve"])
    before, after = (load_file(f / "model.safetensors") for f in (wide_model, tmp_path / "checkpoint"))
    moved = {name for name, value in before.items() if not torch.allclose(value, after[name], atol=1e-6)}
    assert moved and all("layers.1." in name for name in moved)
    assert (tmp_path / "checkpoint" / "adapter" / "adapter_config.json").exists()
    both = recipe.Recipe(rl=section.model_copy(update={"rollouts": "llamacpp"}))
    assert "no adapter" in rl.problems(both)[0]
