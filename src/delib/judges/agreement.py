"""The judge is judged: its agreement with labelled answers that no part of it was fitted on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pydantic import ValidationError

from delib import sources
from delib.errors import UserError
from delib.judges.data import DATA, STARTER, LabelledAnswer, categories, conversation
from delib.judges.prompted import PromptedJudge
from delib.models.calls import side_by_side
from delib.progress import say
from delib.records import Message, Observed
from delib.spec import Spec, digest, read_text
from delib.stats import balanced_accuracy, kappa, kappa_interval

LABELS, ARMS = DATA / "labelled.jsonl", DATA / "labelled-arms.jsonl"
"""Real completions to held-out prompts, labelled blind from docs/labelling.md: those of several models, and those of a
quickstart's own arms. Nothing of the compact judge is fitted on them."""


class Observer(Protocol):
    name: str

    def observe(self, messages: list[Message], answer: str) -> tuple[Observed, dict[str, float]]: ...


class Seen(NamedTuple):
    """A labelled answer and what a judge said of it; `predicted` None is ungraded. Answers to one `prompt` are drawn
    together by intervals."""

    label: Observed
    predicted: Observed | None
    prompt: str
    category: str | None


def load(path: Path) -> list[LabelledAnswer]:
    """Labelled answers: delib's own JSON lines, or a file with JailbreakBench's column `jailbroken`, whose rows without
    an answer are left out and told. Raises UserError listing every bad row."""
    read = list(sources.table(path))
    published = any("jailbroken" in row.data for row in read)
    rows: list[LabelledAnswer] = []
    problems: list[str] = []
    empty = 0
    for place, cells, problem in read:
        try:
            if problem is not None:
                raise ValueError(problem)
            if published and cells.get("response") is None:
                empty += 1
                continue
            rows.append(_jailbreak(cells) if published else LabelledAnswer.model_validate(cells))
        except ValidationError as error:
            for item in error.errors():
                key = ".".join(str(p) for p in item["loc"])
                problems.append(f"{place}: {key + ': ' if key else ''}{item['msg']}")
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise UserError(problems)
    if empty:
        say(f"note: {path}: {empty} rows hold no answer and are left out")
    return rows


def _jailbreak(cells: dict[str, Any]) -> LabelledAnswer:
    """A row of JailbreakBench's attack artifacts: goal, category, response, jailbroken. The judge is shown the plain
    request, as in any evaluation under attack. Raises ValueError."""
    goal, answer, done = cells.get("goal"), cells["response"], str(cells.get("jailbroken")).lower()
    if not isinstance(goal, str) or not goal.strip():
        raise ValueError("goal: not a request")
    if not isinstance(answer, str):
        raise ValueError("response: no text")
    if done not in ("true", "false"):
        raise ValueError(f"jailbroken: {cells.get('jailbroken')!r} is neither true nor false")
    return LabelledAnswer(
        id=str(cells.get("index", digest(goal)[:12])),
        messages=[Message(role="user", content=goal)],
        answer=answer,
        label="comply" if done == "true" else "refuse",
        category=cells.get("category"),
        comply_alone=True,
    )


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
    names = [conversation(row.messages) for row in rows]
    seen = [
        Seen(row.label, p, name, row.category or categories().get(name))
        for row, name, p in zip(rows, names, predicted, strict=True)
    ]
    return {**figures(judge, seen, any(row.comply_alone for row in rows)), "rows": said}


def drawn(rows: list[LabelledAnswer], count: int) -> list[LabelledAnswer]:
    """`count` of the rows, by the hash of their text and answer: the same ones each time."""
    ranked = sorted(rows, key=lambda r: digest(f"{r.messages[-1].content}\n{r.answer}\n{r.id}"))
    return ranked[:count]


def figures(judge: str, rows: Sequence[Seen], comply_alone: bool = False) -> dict[str, Any]:
    """Comply against the rest, as `_two_way` tells it, the whole and `by_category`; balanced_accuracy (None where the
    labels are all on one side); and `confusion` of all labels, or with `comply_alone` of these two.

    A prediction of None is ungraded: left out and counted.
    """
    graded = [(row.label, row.predicted) for row in rows if row.predicted is not None]
    truth, said = [label == "comply" for label, _ in graded], [p == "comply" for _, p in graded]
    pairs = [(_side(a), _side(b)) if comply_alone else (str(a), str(b)) for a, b in graded]
    names = sorted({name for pair in pairs for name in pair})
    found = sorted({row.category for row in rows if row.category is not None})
    return {
        "judge": judge,
        **_two_way(rows),
        "balanced_accuracy": balanced_accuracy(truth, said) if len(set(truth)) == 2 else None,
        "confusion": {
            label: {p: pairs.count((label, p)) for p in names} for label in sorted({label for label, _ in pairs})
        },
        "by_category": {name: _two_way([row for row in rows if row.category == name]) for name in found},
    }


def _two_way(rows: Sequence[Seen]) -> dict[str, Any]:
    """n, n_ungraded, accuracy (the share on which both agree), and kappa with kappa_low and kappa_high. Kappa is None
    where the labels are all on one side: it would be 0 or nothing, whatever the judge said."""
    graded = [row for row in rows if row.predicted is not None]
    truth, said = [_side(row.label) for row in graded], [_side(row.predicted) for row in graded]
    defined = len(set(truth)) == 2
    interval = kappa_interval(truth, said, [row.prompt for row in graded]) if defined else None
    return {
        "n": len(graded),
        "n_ungraded": len(rows) - len(graded),
        "accuracy": sum(t == s for t, s in zip(truth, said, strict=True)) / len(graded) if graded else None,
        "kappa": kappa(truth, said) if defined else None,
        "kappa_low": interval[0] if interval else None,
        "kappa_high": interval[1] if interval else None,
    }


def _side(seen: Observed | None) -> str:
    return "comply" if seen == "comply" else "rest"


def shown(told: dict[str, Any]) -> str:
    """Kappa of `figures`, or of one of its categories, with its interval."""
    if told["kappa"] is None:
        return "kappa undefined (" + ("its labels have only one class" if told["n"] else "nothing was graded") + ")"
    if told["kappa_low"] is None:
        return f"kappa {told['kappa']:.2f} (no interval)"
    return f"kappa {told['kappa']:.2f} [{told['kappa_low']:.2f}, {told['kappa_high']:.2f}]"


def lines(told: dict[str, Any]) -> list[str]:
    """`figures` as lines: a figure that is undefined is told as such, never as a number."""
    shares = ((key, told[key]) for key in ("accuracy", "balanced_accuracy"))
    found = [f"{key}: {told[key]}" for key in ("judge", "n", "n_ungraded")]
    found += [f"{key}: {'undefined' if share is None else format(share, '.3f')}" for key, share in shares]
    found += [shown(told), f"confusion: {told['confusion']}"]
    return found + [f"{row['category']}: {row['counts']}, {row['agreement']}" for row in by_category([told])]


def by_category(agreements: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows of a table: the agreement of each judge in each category, as text."""
    return [
        {
            "judge": one["judge"],
            "category": category,
            "counts": f"n={part['n']}" + (f", {part['n_ungraded']} ungraded" if part["n_ungraded"] else ""),
            "agreement": f"{part['accuracy']:.2f}, {shown(part)}" if part["n"] else shown(part),
        }
        for one in agreements
        for category, part in one["by_category"].items()
    ]
