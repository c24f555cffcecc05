"""The judge is judged: its agreement with labelled answers that no part of it was fitted on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from delib.errors import UserError
from delib.judges.data import DATA, STARTER, LabelledAnswer
from delib.judges.prompted import PromptedJudge
from delib.models.calls import side_by_side
from delib.records import Message, Observed
from delib.spec import Spec, digest, read_text
from delib.stats import balanced_accuracy, kappa

LABELS, ARMS = DATA / "labelled.jsonl", DATA / "labelled-arms.jsonl"
"""Real completions to held-out prompts, labelled blind from docs/labelling.md: those of several models, and those of a
quickstart's own arms. Nothing of the compact judge is fitted on them."""


class Observer(Protocol):
    name: str

    def observe(self, messages: list[Message], answer: str) -> tuple[Observed, dict[str, float]]: ...


def load(path: Path) -> list[LabelledAnswer]:
    """Labelled answers. Raises UserError listing every bad line."""
    rows: list[LabelledAnswer] = []
    problems: list[str] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(LabelledAnswer.model_validate_json(line))
        except ValidationError as error:
            for item in error.errors():
                place = ".".join(str(p) for p in item["loc"])
                problems.append(f"{path}:{number}: {place + ': ' if place else ''}{item['msg']}")
    if problems:
        raise UserError(problems)
    return rows


def shipped() -> list[LabelledAnswer]:
    """All labelled answers of the starter."""
    return load(LABELS) + load(ARMS)


def covers(spec: Spec) -> bool:
    """Whether the shipped labels are about this policy: they are of answers to prompts of the starter's, as it is."""
    return spec.hash == digest(read_text(STARTER / "spec.md"))


def measure(judge: Observer, rows: list[LabelledAnswer], step: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """A judge's agreement with labelled rows: `figures`, and what it said of each row."""
    predicted: list[Observed | None] = []
    for row in rows:
        predicted.append(judge.observe(row.messages, row.answer)[0])
        step()
    return told(judge.name, rows, predicted)


async def ask(
    judge: PromptedJudge, rows: list[LabelledAnswer], at_once: int, step: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """As `measure`, of a prompted judge, `at_once` rows side by side."""
    predicted: dict[int, Observed | None] = {}

    async def one(place: int) -> None:
        predicted[place] = await judge.observe(rows[place].messages, rows[place].answer)
        step()

    await side_by_side(range(len(rows)), one, at_once)
    return told(judge.name, rows, [predicted[place] for place in range(len(rows))])


def told(judge: str, rows: list[LabelledAnswer], predicted: Sequence[Observed | None]) -> dict[str, Any]:
    """Figures, and what the judge said of each row."""
    said = [{"id": r.id, "label": r.label, "predicted": p} for r, p in zip(rows, predicted, strict=True)]
    return {**figures(judge, [r.label for r in rows], predicted), "rows": said}


def drawn(rows: list[LabelledAnswer], count: int) -> list[LabelledAnswer]:
    """`count` of the rows, by the hash of their text and answer: the same ones each time."""
    ranked = sorted(rows, key=lambda r: digest(f"{r.messages[-1].content}\n{r.answer}\n{r.id}"))
    return ranked[:count]


def figures(judge: str, labels: Sequence[Observed], predicted: Sequence[Observed | None]) -> dict[str, Any]:
    """Comply against the rest: accuracy, balanced_accuracy and kappa (None where undefined); all labels: confusion.

    A prediction of None is ungraded: left out and counted.
    """
    graded = [(label, p) for label, p in zip(labels, predicted, strict=True) if p is not None]
    ungraded = len(labels) - len(graded)
    if not graded:
        nothing: dict[str, Any] = {"accuracy": None, "balanced_accuracy": None, "kappa": None, "confusion": {}}
        return {"judge": judge, "n": 0, "n_ungraded": ungraded, **nothing}
    return _figures(judge, [label for label, _ in graded], [p for _, p in graded], ungraded)


def _figures(judge: str, labels: Sequence[Observed], predicted: Sequence[Observed], ungraded: int) -> dict[str, Any]:
    truth, said = [x == "comply" for x in labels], [x == "comply" for x in predicted]
    chance_corrected = kappa([str(t) for t in truth], [str(s) for s in said])
    names = sorted({*labels, *predicted})
    return {
        "judge": judge,
        "n": len(labels),
        "n_ungraded": ungraded,
        "accuracy": sum(t == s for t, s in zip(truth, said, strict=True)) / len(truth),
        "balanced_accuracy": balanced_accuracy(truth, said) if len(set(truth)) == 2 else None,
        "kappa": chance_corrected if chance_corrected == chance_corrected else None,
        "confusion": {
            label: {p: sum(x == label and y == p for x, y in zip(labels, predicted, strict=True)) for p in names}
            for label in sorted(set(labels))
        },
    }
