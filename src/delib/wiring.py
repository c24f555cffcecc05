"""The stage table: which stages there are, what each reads and writes, and which section of the recipe rules it.

Beside the stages of `delib run` stand those of the ablation (`ablate.py`): `cold_start` teaches base the form alone,
`rl_only` is RL from there, and `ablate` measures the arms that `evaluate` does not.
"""

from collections.abc import Callable

from delib.recipe import Recipe
from delib.run import RECORDS, StageFolder

RECORD_STAGES = ("prompts", "generate", "filter", "distill")
"""What comes before training; seeded by the recipe's `data_seed`."""
STAGES = (*RECORD_STAGES, "sft", "rl", "evaluate", "report")
ABLATION = (*RECORD_STAGES, "cold_start", "sft", "rl", "rl_only", "evaluate", "ablate")
"""What `delib ablate` runs, in order: what may find that there is nothing to learn the form from comes early."""
SECTIONS = {"cold_start": "sft", "rl_only": "rl", "ablate": "evaluate"}
"""The section of the recipe that rules a stage without one of its own."""
IDLE = {"sft": {"device_batch"}, "rl": {"device_batch", "report_to"}, "evaluate": {"second_judge"}}
"""Keys that a stage's output does not depend on, beyond rounding: how much is learned from at once, which is lowered
where memory ran out, where curves go beside the manifest, and a judge whose verdicts are added."""
CHECKPOINT = "checkpoint"
TOGETHER = ("sft", "rl", "cold_start", "rl_only")
"""The stages that several processes may run together; the others run in one."""
ARMS = {
    "base": "none",
    "base_spec": "spec in context",
    "cold_start": "form alone",
    "sft": "SFT only",
    "rl_only": "RL only",
    "rl": "both",
}
"""The arms of the ablation, and what they are called in it; each of a stage's model bears that stage's name."""

BEFORE: dict[str, tuple[str, ...]] = {
    "prompts": (),
    "generate": ("prompts",),
    "filter": ("generate",),
    "distill": ("filter",),
    "sft": ("distill",),
    "rl": ("prompts", "sft"),
    "evaluate": ("prompts", "sft", "rl"),
    "report": ("prompts", "generate", "filter", "distill", "sft", "rl", "evaluate"),
    "cold_start": ("prompts", "distill"),
    "rl_only": ("prompts", "cold_start"),
    "ablate": ("prompts", "cold_start", "sft", "rl_only", "rl"),
}


def left_out(recipe: Recipe) -> tuple[str, ...]:
    """The stages that `delib run` has no use for: RL trains the arm of its name and nothing else."""
    return () if "rl" in recipe.evaluate.arms else ("rl",)


def stages_of(recipe: Recipe, last: str = STAGES[-1]) -> tuple[str, ...]:
    """The stages of `delib run` up to and with `last`, which is not left out where it is asked for by name."""
    unasked = left_out(recipe)
    return tuple(name for name in STAGES[: STAGES.index(last) + 1] if name == last or name not in unasked)


def before(recipe: Recipe, stage: str) -> tuple[str, ...]:
    """The stages that a stage reads. One of `delib run` reads none that is left out; those of the ablation read all."""
    unasked = left_out(recipe) if stage in STAGES else ()
    return tuple(name for name in BEFORE[stage] if name not in unasked)


def _records(folder: StageFolder) -> list[str]:
    return [RECORDS]


def _checkpoint(folder: StageFolder) -> list[str]:
    return [CHECKPOINT]


def _both(folder: StageFolder) -> list[str]:
    return [RECORDS, CHECKPOINT]


def _answers(folder: StageFolder) -> list[str]:
    return [*(f"{p.name}/{RECORDS}" for p in sorted(folder.path.iterdir()) if p.is_dir()), "metrics.json"]


OUTPUTS: dict[str, Callable[[StageFolder], list[str]]] = {
    **dict.fromkeys(RECORD_STAGES, _records),
    **dict.fromkeys(("sft", "cold_start"), _checkpoint),
    **dict.fromkeys(("rl", "rl_only"), _both),
    **dict.fromkeys(("evaluate", "ablate"), _answers),
    "report": lambda folder: ["report.html", "report.md", "metrics.json", "summary.txt"],
}
