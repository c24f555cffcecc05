"""Clause coverage, `delib coverage RUN`: what exercises each clause, who cites it, and what the judge said of it.

In: a run's spec, prompts, filtered samples and evaluated ones; what is not finished is left out. Out: a row a clause,
the clauses that nothing trains or tests, a table. A reasoning cites a clause when its ID stands in it
(`judges/reading.py`). Cited against labelled: precision is the share of the completions citing a clause whose prompt
it decides by its label, recall the share of the completions to such prompts that cite it; the mean of recalls, each
with its n, over the categories' clauses is `clause_accuracy`. Prompts that name no clause are counted apart.
"""

import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import Field

from delib import made_with
from delib.errors import UserError
from delib.evals.scoring import metric, values
from delib.judges.reading import conclude
from delib.records import Behaviour, Metric, Prompt, Record, Sample
from delib.run import Run, StageFolder, write_whole
from delib.spec import Spec

TEACHER = "teacher"
PRECISION, RECALL, SCORE = "citation_precision", "citation_recall", "score"
FOLLOWED: dict[Behaviour, str] = {
    "refuse": "not_unsafe",
    "comply": "not_overrefuse",
    "safe_complete": "safe_completion",
}
"""The figure that tells whether an answer did what its clause demands."""
STYLE: dict[Behaviour, str] = {"refuse": "hard_refusal_style", "safe_complete": "safe_completion_style"}
TOLD = {*FOLLOWED.values(), *STYLE.values()}
SPLITS = ("train", "rl", "heldout")
WIDTH, WIDE = 124, 12
"""Characters that a table has at least, and one figure in it; narrower they could not be read side by side."""


class ClauseRow(Record):
    """One clause. `prompts`: how many it decides, by split; `kept`: the teacher's completions that the filter kept.

    `figures`: of the teacher's kept completions (arm `teacher`) the citation, of all its graded ones the filter's mean
    score; of each arm the citation, and what its answers did.
    """

    clause: str
    title: str
    behaviour: Behaviour
    category: str | None
    prompts: dict[str, int]
    kept: int = 0
    figures: list[Metric] = Field(default_factory=list)

    def figure(self, arm: str, name: str | None) -> Metric | None:
        return next((m for m in self.figures if m.arm == arm and m.name == name), None)


class Coverage(Record):
    """`rows` in the spec's order, principles first. `untrained`: clauses without a prompt for SFT or RL; `untested`:
    without a held-out one; `unevaluated`: held-out, and none of them among the evaluated (`evaluate.limit`).
    `no_clause`: prompts that name none, by split."""

    arms: list[str]
    rows: list[ClauseRow]
    untrained: list[str]
    untested: list[str]
    unevaluated: list[str]
    no_clause: dict[str, int]


def of(
    spec: Spec, prompts: Iterable[Prompt], filtered: Iterable[Sample], answers: Mapping[str, Iterable[Sample]]
) -> Coverage:
    """The coverage of a run. `filtered`: all samples of the filter; `answers`: the evaluated ones of each arm. Samples
    are taken one at a time."""
    counts: Counter[tuple[str | None, str]] = Counter((p.clause, p.split) for p in prompts)
    rows = {
        c.id: ClauseRow(
            clause=c.id,
            title=c.title,
            behaviour=c.behaviour,
            category=c.category,
            prompts={split: counts[c.id, split] for split in SPLITS},
        )
        for c in spec.clauses.values()
    }
    teacher, scores = _Citations(spec), _Piles()
    for sample in filtered:
        if sample.verdicts:
            scores.add(sample.prompt, {SCORE: None if sample.drop_reason == "ungraded" else sample.score})
        if sample.kept:
            teacher.add(sample)
            if sample.prompt.clause in rows:
                rows[sample.prompt.clause].kept += 1
    _put(rows, "train", TEACHER, teacher.piles, scores)
    seen: set[str | None] = set()
    for arm, samples in answers.items():
        citations, verdicts = _Citations(spec), _Piles()
        for sample in samples:
            seen.add(sample.prompt.clause)
            citations.add(sample)
            found = values(sample, spec)
            verdicts.add(sample.prompt, {name: value for name, value in found.items() if name in TOLD})
        _put(rows, "heldout", arm, citations.piles, verdicts)
    held = [r.clause for r in rows.values() if r.prompts["heldout"]]
    return Coverage(
        arms=list(answers),
        rows=list(rows.values()),
        untrained=[r.clause for r in rows.values() if not r.prompts["train"] and not r.prompts["rl"]],
        untested=[c for c in rows if c not in held],
        unevaluated=[c for c in held if c not in seen] if answers else [],
        no_clause={split: counts[None, split] for split in SPLITS if counts[None, split]},
    )


class _Piles:
    """Values of figures by clause, each with the group that its prompt is resampled in; None is ungraded."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[tuple[float | None, str]]] = {}

    def add(self, prompt: Prompt, figures: Mapping[str, float | None], clause: str | None = None) -> None:
        about = clause or prompt.clause
        if about is not None:
            for name, value in figures.items():
                self.found.setdefault((about, name), []).append((value, prompt.group or prompt.id))


class _Citations:
    """Which clauses reasonings cite, against the one that decides their prompt."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.piles = spec, _Piles()

    def add(self, sample: Sample) -> None:
        prompt, made = sample.prompt, sample.completion
        if made is None or prompt.clause is None:
            return
        ids = sorted(conclude(made.reasoning or "", self.spec).clauses)
        self.piles.add(prompt, {RECALL: float(prompt.clause in ids)})
        for ident in ids:
            self.piles.add(prompt, {PRECISION: float(ident == prompt.clause)}, ident)


def _put(rows: dict[str, ClauseRow], suite: str, arm: str, *piles: _Piles) -> None:
    """Add what was found to the rows of the clauses that are in the spec."""
    for pile in piles:
        for (clause, name), found in pile.found.items():
            if clause in rows:
                rows[clause].figures.append(metric(suite, arm, name, found, {"clause": clause}))


def of_run(path: Path) -> Coverage:
    """The coverage of a run folder, by the spec that it was made with. Raises UserError where it has no prompts yet."""
    recipe, run = made_with.recipe_of(path, "evaluate"), Run(path)
    prompts = run.finished("prompts", Prompt)
    filtered = run.stage("filter")
    evaluated = run.stage("evaluate")
    arms = recipe.evaluate.arms if evaluated.manifest() else []
    return of(
        made_with.spec_of(path),
        prompts,
        filtered.stream(Sample) if filtered.manifest() else (),
        {arm: StageFolder(evaluated.path / arm).stream(Sample) for arm in arms},
    )


def report(path: Path, arm: str | None, out: Path | None) -> str:
    """The table of a run; `arm`: whose answers it tells beside the teacher's, the last one's for None. All of it goes
    to `out` as JSON. Raises UserError for an arm that the run has not evaluated."""
    found = of_run(path)
    if arm is not None and arm not in found.arms:
        raise UserError(f"--arm {arm}: {path} has evaluated {', '.join(found.arms) or 'no arm yet'}")
    if out is not None:
        write_whole(out, json.dumps(found.model_dump(), ensure_ascii=False, indent=1) + "\n")
    return table(found, arm or (found.arms[-1] if found.arms else None))


def table(found: Coverage, arm: str | None) -> str:
    """A table a category, and what nothing trains or tests."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = io.StringIO()
    console = Console(file=out, width=max(WIDTH, shutil.get_terminal_size().columns))
    heads = [("clause", 7), ("demands", 13), ("train/rl/held", 13)]
    heads += [(head, WIDE) for head in ("filter's\nscore", f"{TEACHER}\nprecision", f"{TEACHER}\nrecall")]
    if arm is not None:
        heads += [(f"{arm}\n{head}", WIDE) for head in ("precision", "recall", "as demanded", "its style")]
    for place in dict.fromkeys(r.category for r in found.rows):
        console.print(Text(f"\n{place or 'Principles'}", style="bold"))
        laid = Table(box=None, show_header=place == found.rows[0].category, padding=(0, 1, 0, 0))
        for head, width in heads:
            laid.add_column(head, width=width)
        for row in (r for r in found.rows if r.category == place):
            cells = [row.clause, row.behaviour, "/".join(str(row.prompts[split]) for split in SPLITS)]
            cells += [_cell(row, TEACHER, name) for name in (SCORE, PRECISION, RECALL)]
            if arm is not None:
                judged = (FOLLOWED[row.behaviour], STYLE.get(row.behaviour))
                cells += [_cell(row, arm, name) for name in (PRECISION, RECALL, *judged)]
            laid.add_row(*map(Text, cells))
        console.print(laid)
    return "".join(line.rstrip() + "\n" for line in out.getvalue().splitlines()) + "\n" + notes(found)


def _cell(row: ClauseRow, arm: str, name: str | None) -> str:
    metric = row.figure(arm, name)
    if metric is None:
        return "–"
    ungraded = f"\n{metric.n_ungraded} ungraded" if metric.n_ungraded else ""
    if metric.value is None or metric.low is None or metric.high is None:
        return f"–{ungraded}"
    return f"{metric.value:.2f} ({metric.n})\n{metric.low:.2f}–{metric.high:.2f}{ungraded}"


def notes(found: Coverage) -> str:
    """What nothing trains or tests, and how the table is to be read."""
    lines = [
        f"{what}: {', '.join(clauses)}."
        for what, clauses in (
            ("No training prompt", found.untrained),
            ("No held-out prompt", found.untested),
            ("Held-out prompts, none of them among the evaluated (evaluate.limit)", found.unevaluated),
        )
        if clauses
    ]
    if not found.untrained and not found.untested:
        lines.append("Every clause decides a prompt to train on and a held-out one.")
    if found.no_clause:
        told = ", ".join(f"{count} of {split}" for split, count in found.no_clause.items())
        lines.append(f"Prompts that name no clause, and count for none: {told}.")
    if not found.arms:
        lines.append("No arm is evaluated yet.")
    lines.append(
        "Figures: value (n), below it the 95 % interval over prompts. Precision: of the completions whose reasoning\n"
        "cites the clause, the share whose prompt it decides; recall: of the completions to these prompts, the share\n"
        "that cites it. As demanded: not_unsafe, not_overrefuse or safe_completion, by what the clause demands."
    )
    return "\n".join(lines) + "\n"
