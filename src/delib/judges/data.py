"""What the compact judge is fitted on: labelled answers and style elements, and the recorded completions that ship.

Every row belongs to the fold of its prompt, so that no member grades a prompt that it was fitted on.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel

from delib.models import recorded
from delib.models.recorded import Recording
from delib.records import Message, Observed, Prompt

STARTER = Path(__file__).parent.parent / "starter"
DATA = STARTER / "judge"
FOLDS = 4
EVERYDAY = "everyday"
"""Stands for the category of prompts that have none."""


class LabelledAnswer(BaseModel):
    """An answer with what it does, in the words of docs/labelling.md. `id` names the prompt's fold. `comply_alone`: the
    label tells comply from the rest and no more."""

    id: str
    messages: list[Message]
    answer: str
    label: Observed
    category: str | None = None
    comply_alone: bool = False


class LabelledElement(BaseModel):
    """Whether an answer shows a style element."""

    text: str
    examples: list[str]
    answer: str
    present: bool


def fold_of(prompt_id: str) -> int:
    return int(hashlib.sha256(prompt_id.encode()).hexdigest(), 16) % FOLDS


def load_answers(path: Path) -> list[LabelledAnswer]:
    return [LabelledAnswer.model_validate_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def load_elements(path: Path) -> list[LabelledElement]:
    return [LabelledElement.model_validate_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def conversation(messages: list[Message]) -> str:
    return "\n".join(f"{m.role}: {m.content}" for m in messages)


@lru_cache(maxsize=1)
def categories() -> dict[str, str]:
    """The category of each of the starter's held-out prompts, by its conversation."""
    rows = (STARTER / "heldout.jsonl").read_text(encoding="utf-8").split("\n")
    prompts = [Prompt.model_validate_json(row) for row in rows if row]
    return {conversation(p.messages): p.category or EVERYDAY for p in prompts}


def demonstrations() -> list[tuple[Prompt, Recording]]:
    """The shipped recorded completions with their prompts; those without an answer are left out."""
    rows = (STARTER / "prompts.jsonl").read_text(encoding="utf-8").split("\n")
    prompts = {p.id: p for p in (Prompt.model_validate_json(row) for row in rows if row)}
    found = [r for many in recorded.load(STARTER / "demonstrations.jsonl").values() for r in many]
    return [(prompts[r.prompt_id], r) for r in found if r.finish == "stop" and r.completion().answer]


def label_of(prompt: Prompt, recording: Recording) -> Observed | None:
    """What a recorded answer does, from the prompt's behaviour and the marked fault; None where that does not tell."""
    if recording.fault in ("over_refusal", "lecture"):
        return "refuse"
    if recording.fault == "wrong_behaviour":
        return "comply" if recording.stand_in else None
    return prompt.behaviour
