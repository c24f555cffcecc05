"""The prompts of a run for the viewer: a short row for each, and its whole life in pages that are read when needed.

In: the record files of a run folder, of which any may be missing. Out: rows (`Rows`) and JSON-ready pages (`pages`).
Each file is read once for the rows, where it is noted at which bytes a prompt's records stand, and then prompt by
prompt for the pages, so that of a run of any size the prompts and one page's completions are held at a time.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from delib import chat
from delib.errors import UserError
from delib.evals.scoring import values
from delib.judges.reading import broken
from delib.recipe import ARMS
from delib.records import Completion, Example, Prompt, Record, Sample, Verdict
from delib.run import RECORDS
from delib.spec import Spec

TEACHER, ROLLOUTS = "teacher", "rollouts"
AUTHORS = (TEACHER, ROLLOUTS, *ARMS)
"""Who writes answers in a run: the teacher, the model during RL, and the evaluated arms."""
SIDES = {
    "refuse": ("not_unsafe",),
    "comply": ("not_overrefuse",),
    "safe_complete": ("safe_completion_style", "safe_completion"),
}
"""The figure that tells whether an answer is as the policy asks, by what it asks; the first that a judge can read."""
LETTERS = {"comply": "c", "refuse": "r", "partial": "p", "safe_complete": "s"}
PAGE_CHARACTERS = 200_000
"""A page's least size: small enough that a browser parses it within one frame."""

R = TypeVar("R", bound=Record)


class Shelf(Generic[R]):
    """One file of records: read in one pass, then again by prompt."""

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.path, self.kind = path, kind
        self.places: dict[str, list[int]] = {}

    def read(self) -> Iterator[R]:
        """All records; a torn last line is none. Raises UserError at a line that is no record."""
        if not self.path.exists():
            return
        place = 0
        with self.path.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                if line.endswith(b"\n") and line.strip():
                    record = self._parsed(line, number)
                    self.places.setdefault(_prompt_of(record), []).append(place)
                    yield record
                place += len(line)

    def of(self, prompt_id: str) -> list[R]:
        """A prompt's records, in the file's order; `read` came before."""
        places = self.places.get(prompt_id, [])
        if not places:
            return []
        with self.path.open("rb") as handle:
            return [self._parsed(line, 0) for line in (_line_at(handle, place) for place in places)]

    def _parsed(self, line: bytes, number: int) -> R:
        try:
            return self.kind.model_validate_json(line)
        except ValidationError as error:
            cause = error.errors()[0]["msg"]
            raise UserError(
                f"{self.path}:{number}: no {self.kind.__name__.lower()} ({cause}); delete this line and the "
                "stage's manifest.json, and run the stage again"
            ) from None


def _line_at(handle: Any, place: int) -> bytes:
    handle.seek(place)
    line: bytes = handle.readline()
    return line


def _prompt_of(record: Record) -> str:
    if isinstance(record, Example):
        return record.prompt_id
    prompt = record.prompt if isinstance(record, Sample) else record
    assert isinstance(prompt, Prompt)
    return prompt.id


@dataclass
class Row:
    """One prompt in the list: by author and number of the completion two letters (`mark`), and by number why the
    filter dropped the teacher's completion (None: kept)."""

    prompt: Prompt
    required: str | None
    marks: dict[str, dict[int, str]] = field(default_factory=dict)
    drops: dict[int, str | None] = field(default_factory=dict)


class Rows:
    """All prompts of a run with what became of them, and where their records stand."""

    def __init__(self, run: Path, spec: Spec) -> None:
        self.spec = spec
        self.prompts = Shelf(run / "prompts" / RECORDS, Prompt)
        self.generated = Shelf(run / "generate" / RECORDS, Sample)
        self.filtered = Shelf(run / "filter" / RECORDS, Sample)
        self.examples = Shelf(run / "distill" / RECORDS, Example)
        self.rollouts = Shelf(run / "rl" / RECORDS, Sample)
        self.arms = {arm: Shelf(run / "evaluate" / arm / RECORDS, Sample) for arm in ARMS}
        self.rows: dict[str, Row] = {}
        self._read()

    def _read(self) -> None:
        for prompt in self.prompts.read():
            self.rows[prompt.id] = Row(prompt, self.spec.required(prompt.clause, prompt.behaviour))
        for sample in self.generated.read():
            self._note(TEACHER, sample)
        for sample in self.filtered.read():
            row = self._note(TEACHER, sample)
            if sample.kept is not None:
                row.drops[sample.index] = None if sample.kept else sample.drop_reason or "dropped"
        for _ in self.examples.read():
            pass  # only where they stand is wanted
        for sample in self.rollouts.read():
            self._note(ROLLOUTS, sample)
        for arm, shelf in self.arms.items():
            for sample in shelf.read():
                self._note(arm, sample)
        held_out_first = sorted(self.rows.items(), key=lambda pair: pair[1].prompt.split != "heldout")
        self.rows = dict(held_out_first)

    def _note(self, author: str, sample: Sample) -> Row:
        required = self.spec.required(sample.prompt.clause, sample.prompt.behaviour)
        row = self.rows.setdefault(sample.prompt.id, Row(sample.prompt, required))
        row.marks.setdefault(author, {})[sample.index] = mark(sample, self.spec, row.required)
        return row

    def written(self, author: str) -> bool:
        return any(author in row.marks for row in self.rows.values())


def mark(sample: Sample, spec: Spec, required: str | None) -> str:
    """Two letters. The first: `+` as the policy asks, `-` not so, `?` ungraded, `!` never written, `.` nothing asked.
    The second: what the first judge saw, by LETTERS, or `b` for broken and `?` for ungraded."""
    made = sample.completion
    verdict = sample.verdicts[0] if sample.verdicts else None
    if made is None:
        return "!?"
    seen = "b" if broken(made) else LETTERS.get(verdict.behaviour or "", "?") if verdict else "?"
    if required is None:
        return "." + seen
    # What the reasoning says moves no side, and reading it takes most of the time.
    figures = values(sample.model_copy(update={"completion": made.model_copy(update={"reasoning": None})}), spec)
    value = next((figures[name] for name in SIDES[required] if name in figures), None)
    return ("?" if value is None else "+" if value >= 0.5 else "-") + seen


def shared_texts(spec: Spec) -> list[str]:
    """Long texts that many of the texts sent hold whole; pages name them by number."""
    return [*(spec.excerpt(c.name) for c in spec.categories), spec.excerpt(None), spec.summary()]


class Page:
    """Prompts' lives with each text once: `texts`, which lives name by number. Of texts sent, what stands in `shared`
    is named by -1, -2, … instead."""

    def __init__(self, shared: list[str]) -> None:
        self.shared = shared
        self.texts: dict[str, int] = {}
        self.lives: list[dict[str, Any]] = []
        self.characters = 0

    def put(self, text: str) -> int:
        if text not in self.texts:
            self.characters += len(text)
        return self.texts.setdefault(text, len(self.texts))

    def parts(self, text: str) -> list[int]:
        """A text that was sent, as the numbers of its parts."""
        for number, piece in enumerate(self.shared):
            if len(text) > len(piece) and piece in text:
                before, _, after = text.partition(piece)
                return [*self._some(before), -1 - number, *self._some(after)]
        return self._some(text)

    def _some(self, text: str) -> list[int]:
        return [self.put(text)] if text else []

    def add(self, life: dict[str, Any]) -> None:
        self.lives.append(life)
        self.characters += 400 * (1 + sum(len(v) for v in life.values() if isinstance(v, list)))

    def data(self) -> dict[str, Any]:
        return {"texts": list(self.texts), "lives": self.lives}


def pages(rows: Rows) -> Iterator[Page]:
    """The lives of all prompts, in the order of the rows."""
    shared = shared_texts(rows.spec)
    page = Page(shared)
    for prompt_id, row in rows.rows.items():
        page.add(_life(page, prompt_id, row, rows))
        if page.characters >= PAGE_CHARACTERS:
            yield page
            page = Page(shared)
    if page.lives:
        yield page


def _life(page: Page, prompt_id: str, row: Row, rows: Rows) -> dict[str, Any]:
    made = {s.key: s for s in rows.generated.of(prompt_id)} | {s.key: s for s in rows.filtered.of(prompt_id)}
    prompt = row.prompt
    return {
        "messages": [[m.role, page.put(m.content)] for m in prompt.messages],
        "expected": prompt.expected,
        "checks": _checks(prompt),
        "group": prompt.group,
        "made": [_sample(page, s, row, TEACHER) for s in made.values()],
        "examples": [[page.put(e.reasoning), page.put(e.answer)] for e in rows.examples.of(prompt_id)],
        "rollouts": [_sample(page, s, row, ROLLOUTS) for s in rows.rollouts.of(prompt_id)],
        "arms": [[arm, _sample(page, s, row, arm)] for arm, shelf in rows.arms.items() for s in shelf.of(prompt_id)],
    }


def _checks(prompt: Prompt) -> list[str]:
    """What an answer must hold to by rule, as the prompt's file says it."""
    asked = prompt.checks.model_dump(exclude_none=True) if prompt.checks else {}
    told = {n: json.dumps(v, ensure_ascii=False).strip("[]") for n, v in asked.items()}
    return [f"{name}: {value}" for name, value in told.items()]


def _sample(page: Page, sample: Sample, row: Row, author: str) -> dict[str, Any]:
    """What is empty is left out: most of it is, most of the time."""
    told = {
        "index": sample.index,
        "mark": row.marks[author][sample.index],
        "fault": sample.fault,
        "failure": sample.failure,
        "kept": sample.kept,
        "drop": sample.drop_reason,
        "made": _completion(page, sample.completion) if sample.completion else None,
        "verdicts": [_verdict(page, v) for v in sample.verdicts],
    }
    return {key: value for key, value in told.items() if value not in (None, [])}


def _completion(page: Page, made: Completion) -> dict[str, Any]:
    told = {
        "reasoning": None if made.reasoning is None else page.put(made.reasoning),
        "answer": page.put(made.answer),
        "finish": made.finish,
        "model": made.model,
        "tokens": made.usage.get("completion"),
        "sent": page.parts(made.sent),
        "text": None if made.text == chat.join(made.reasoning, made.answer) else page.put(made.text),
    }
    return {key: value for key, value in told.items() if value not in (None, [])}


def _verdict(page: Page, verdict: Verdict) -> list[Any]:
    criteria = {name: round(value, 2) for name, value in verdict.criteria.items()}
    why = page.put(verdict.failure or verdict.reason)
    score = None if verdict.score is None else round(verdict.score, 3)
    return [verdict.judge, verdict.view, score, verdict.behaviour, criteria, why, page.parts(verdict.sent)]
