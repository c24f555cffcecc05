"""Progress of training in delib's own bar, with the loss, or the reward, of the step beside it.

In: a trainer that is about to train. Out: the trained one. Only the process that leads tells of it; the curve itself
stands in the trainer's history and in the manifest.
"""

import warnings
from pathlib import Path
from typing import Any

from delib.models import weights
from delib.progress import bar
from delib.training import processes

SHOWN = ("reward", "loss")
"""What of a step's log stands beside the bar: the first that is there."""


def train(trainer: Any, what: str, steps: int, last: Path | None) -> None:
    """Train to `steps`, from the checkpoint `last` on where there is one. `trainer`: of transformers, without a bar."""
    from transformers import PrinterCallback, TrainerCallback

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ticker.step()

        def on_log(self, *_: Any, **told: Any) -> None:
            logs = told["logs"]
            shown = next((name for name in SHOWN if logs.get(name) is not None), None)
            if shown is not None:
                ticker.note(f"{shown} {logs[shown]:.3f}")

    trainer.remove_callback(PrinterCallback)
    # TRL 1.16 reads a name that transformers 5.23 has replaced; nobody who runs a recipe can mend that.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    if not processes.leads():
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        return
    with bar(what, steps, weights.step_of(last)) as ticker:
        trainer.add_callback(Watch())
        trainer.train(resume_from_checkpoint=str(last) if last else None)
