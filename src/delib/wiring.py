"""The stage table: which stages there are, what each reads and writes, and which section of the recipe rules it.

Beside the stages of `delib run` stand those of the ablation (`ablate.py`): `cold_start` teaches base the form alone,
`rl_only` is RL from there, and `ablate` measures the arms that `evaluate` does not.
"""

from collections.abc import Callable

from delib.run import RECORDS, StageFolder

RECORD_STAGES = ("prompts", "generate", "filter", "distill")
"""What comes before training; seeded by the recipe's `data_seed`."""
STAGES = (*RECORD_STAGES, "sft", "rl", "evaluate", "report")
ABLATION = (*RECORD_STAGES, "cold_start", "sft", "rl", "rl_only", "evaluate", "ablate")
"""What `delib ablate` runs, in order: what may find that there is nothing to learn the form from comes early."""
SECTIONS = {"cold_start": "sft", "rl_only": "rl", "ablate": "evaluate"}
"""The section of the recipe that rules a stage without one of its own."""
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
    "report": lambda folder: ["report.html", "report.md", "metrics.json"],
}
