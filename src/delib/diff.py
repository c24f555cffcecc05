"""What an edit of the policy did: `delib diff RUN_A RUN_B`.

In: two runs that have evaluated a common arm. Out: the spec's difference in words; of each figure, in all and by
category and clause, before, after and the paired difference with its interval; the prompts that changed sides, with
both completions. Each run's answers are held against its own spec and labels: where the edit changed what a prompt
demands, the figures of the old demand have no pair, and `as_required` (did the answer what its own run's policy
demands?) tells what became of it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from delib import compare, made_with
from delib.authoring import diff as specs_diff
from delib.coverage import FOLLOWED
from delib.errors import UserError
from delib.evals.scoring import HEADLINE, values
from delib.recipe import Recipe
from delib.records import Prompt, Record, Sample
from delib.run import Run, StageFolder
from delib.spec import Spec
from delib.stages.prompts import content_id
from delib.stats import differ, holm, p_value, paired
from delib.wiring import IDLE

AS_REQUIRED = "as_required"
OF_CATEGORY = (AS_REQUIRED, *HEADLINE)
OF_CLAUSE = (AS_REQUIRED, "clause_accuracy")
APART = ("name", "spec", "limits", "report")
"""Keys of a recipe that change no figure, or that the spec's difference tells."""


class Line(Record):
    """One figure, over the prompts that both runs have graded. `part`: of all prompts (""), a category or a clause.

    `adjusted`: p after Holm's correction for all lines. `sure`: the interval leaves out zero and, for figures of 0 and
    1, the exact sign test has p < 0.05.
    """

    figure: str
    kind: str
    part: str
    edited: bool
    n: int
    n_ungraded: int
    before: float | None = None
    after: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    adjusted: float | None = None
    sure: bool = False


class Answered(Record):
    """What an arm wrote in one run, and what that run's label demands of it."""

    clause: str | None
    demands: str | None
    as_required: float | None
    reasoning: str | None
    answer: str | None


class Pair(NamedTuple):
    """One prompt in both runs, with its figures."""

    first: Sample
    second: Sample
    before: dict[str, float | None]
    after: dict[str, float | None]
    demands: tuple[str | None, str | None]

    @property
    def prompt(self) -> Prompt:
        return self.second.prompt

    @property
    def moved(self) -> bool:
        """Whether the answer did what is demanded in one run only."""
        both = (self.before.get(AS_REQUIRED), self.after.get(AS_REQUIRED))
        return None not in both and both[0] != both[1]

    @property
    def relabelled(self) -> bool:
        return self.demands[0] != self.demands[1] or self.first.prompt.clause != self.prompt.clause


class RunDiff(Record):
    """The difference of two runs. `recipes`: keys beside the spec in which they differ. `relabelled`: ids of prompts
    with another clause or demand; `changed`: prompts that changed sides, those of edited clauses first."""

    first: str
    second: str
    arm: str
    spec: dict[str, Any]
    recipes: list[str]
    in_both: int
    only_first: int
    only_second: int
    relabelled: list[str]
    lines: list[Line]
    changed: list[dict[str, Any]]


class _Side(NamedTuple):
    recipe: Recipe
    spec: Spec


def report(first: Path, second: Path, arm: str | None, most: int, as_json: bool) -> str:
    """The difference in words, with `most` of the prompts that changed sides, or all of it as one JSON object."""
    found, words = of(first, second, arm)
    if as_json:
        return json.dumps(found.model_dump(), ensure_ascii=False) + "\n"
    return words + tell(found, most)


def of(first: Path, second: Path, arm: str | None) -> tuple[RunDiff, str]:
    """The difference of two runs, and that of their specs in words. `arm` None: the last that both have. Raises
    UserError where one is not evaluated, or they share no prompt or arm."""
    one, two = _opened(first, second)
    arm = _arm(arm, one.recipe, two.recipe, first, second)
    told = specs_diff.compare(one.spec, two.spec)
    answers = [_answers(path, arm) for path in (first, second)]
    pairs = [_pair(answers[0][i], answers[1][i], one.spec, two.spec) for i in answers[0] if i in answers[1]]
    if not pairs:
        raise UserError(f"{first} and {second} have evaluated no common prompt; keep prompts.heldout the same for both")
    edited = {c.new if c.what == "renumbered" else c.name for c in told.changes if c.kind == "clause"}
    moved = sorted((p for p in pairs if p.moved), key=lambda p: p.prompt.clause not in edited)
    found = RunDiff(
        first=str(first),
        second=str(second),
        arm=arm,
        spec=told.model_dump(),
        recipes=_recipes(one.recipe, two.recipe),
        in_both=len(pairs),
        only_first=len(answers[0]) - len(pairs),
        only_second=len(answers[1]) - len(pairs),
        relabelled=[p.prompt.id for p in pairs if p.relabelled],
        lines=_corrected(list(_lines(pairs, {name for name in edited if name}))),
        changed=[_changed(p) for p in moved],
    )
    return found, specs_diff.tell(told, one.spec.text == two.spec.text)


def _opened(first: Path, second: Path) -> list[_Side]:
    found, problems = list[_Side](), list[str]()
    for path in (first, second):
        try:
            recipe = made_with.recipe_of(path, "evaluate")
            Run(path).folder_of("evaluate")
            found.append(_Side(recipe, made_with.spec_of(path)))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return found


def _arm(arm: str | None, one: Recipe, two: Recipe, first: Path, second: Path) -> str:
    both: list[str] = [a for a in one.evaluate.arms if a in two.evaluate.arms]
    if not both or (arm is not None and arm not in both):
        asked = f"--arm {arm}: " if arm is not None else ""
        arms = [f"{path} has evaluated {', '.join(r.evaluate.arms)}" for path, r in ((first, one), (second, two))]
        raise UserError(f"{asked}{' and '.join(arms)}; name an arm that both have, or evaluate it in both")
    return arm or both[-1]


def _answers(path: Path, arm: str) -> dict[str, Sample]:
    """The samples of an arm by their conversation."""
    return {content_id(s.prompt): s for s in StageFolder(path / "evaluate" / arm).stream(Sample)}


def _pair(first: Sample, second: Sample, old: Spec, new: Spec) -> Pair:
    before, after = values(first, old), values(second, new)
    demands = [spec.required(s.prompt.clause, s.prompt.behaviour) for spec, s in ((old, first), (new, second))]
    for found, demand in zip((before, after), demands, strict=True):
        if demand is not None:
            found[AS_REQUIRED] = found[FOLLOWED[demand]]
        if demands[0] != demands[1]:  # a score by another demand
            found.pop("judge_score", None)
    return Pair(first, second, before, after, (demands[0], demands[1]))


def _recipes(one: Recipe, two: Recipe) -> list[str]:
    """The keys in which two recipes differ, with both values."""
    found = []
    old, new = one.model_dump(exclude=set(APART)), two.model_dump(exclude=set(APART))
    for name in old:
        nested = isinstance(old[name], dict) and isinstance(new[name], dict)
        for key in old[name] if nested else ():
            if old[name][key] != new[name][key] and key not in IDLE.get(name, ()):
                found.append(f"{name}.{key} {old[name][key]} → {new[name][key]}")
        if not nested and old[name] != new[name]:
            found.append(f"{name} {old[name]} → {new[name]}")
    return found


def _lines(pairs: list[Pair], edited: set[str]) -> Iterator[Line]:
    """A line a figure over all prompts, and the main ones by category and by clause, edited clauses first; a prompt
    is of the category and clause that it has in the second run."""
    names = [AS_REQUIRED, *dict.fromkeys(n for p in pairs for n in p.before if n != AS_REQUIRED)]
    yield from _figures(pairs, names, "all", "", False)
    for category in dict.fromkeys(p.prompt.category for p in pairs):
        of_it = [p for p in pairs if p.prompt.category == category]
        yield from _figures(of_it, OF_CATEGORY, "category", category or specs_diff.NO_CATEGORY, False)
    clauses = dict.fromkeys(p.prompt.clause for p in pairs if p.prompt.clause)
    for clause in sorted(clauses, key=lambda c: c not in edited):
        of_it = [p for p in pairs if p.prompt.clause == clause]
        yield from _figures(of_it, OF_CLAUSE, "clause", clause or "", clause in edited)


def _figures(pairs: list[Pair], names: Any, kind: str, part: str, edited: bool) -> Iterator[Line]:
    for name in names:
        both = [(p.before[name], p.after[name], p.prompt) for p in pairs if name in p.before and name in p.after]
        graded = [(a, b, prompt.group or prompt.id) for a, b, prompt in both if a is not None and b is not None]
        line = Line(figure=name, kind=kind, part=part, edited=edited, n=len(graded), n_ungraded=len(both) - len(graded))
        if graded:
            yield _measured(line, graded)
        elif both:
            yield line


def _measured(line: Line, graded: list[tuple[float, float, str]]) -> Line:
    before, after, groups = (list(part) for part in zip(*graded, strict=True))
    mean, low, high = paired(before, after, groups=groups)
    shares = set(before) | set(after) <= {0.0, 1.0}
    told = {
        "before": sum(before) / len(before),
        "after": sum(after) / len(after),
        "difference": mean,
        "low": low,
        "high": high,
        "p": p_value(before, after, groups),
        "sure": (low > 0 or high < 0) and (not shares or differ(before, after) < compare.SURE),
    }
    return line.model_copy(update=told)


def _corrected(lines: list[Line]) -> list[Line]:
    adjusted = iter(holm([line.p for line in lines if line.p is not None]))
    return [line if line.p is None else line.model_copy(update={"adjusted": next(adjusted)}) for line in lines]


def _changed(pair: Pair) -> dict[str, Any]:
    sides = {}
    for name, sample, figures, demand in (
        ("before", pair.first, pair.before, pair.demands[0]),
        ("after", pair.second, pair.after, pair.demands[1]),
    ):
        made = sample.completion
        sides[name] = Answered(
            clause=sample.prompt.clause,
            demands=demand,
            as_required=figures[AS_REQUIRED],
            reasoning=made.reasoning if made else None,
            answer=made.answer if made else None,
        ).model_dump()
    return {"id": pair.prompt.id, "category": pair.prompt.category, "asked": pair.prompt.messages[-1].content, **sides}


def tell(found: RunDiff, most: int) -> str:
    """The difference in words, but for the spec's."""
    lines = ["", f"first: {found.first}", f"second: {found.second}", f"arm: {found.arm}"]
    alone = [
        f"{n} in the {which} alone" for n, which in ((found.only_first, "first"), (found.only_second, "second")) if n
    ]
    lines.append(f"held-out prompts in both: {found.in_both}" + (f"; {', '.join(alone)}" if alone else ""))
    if found.relabelled:
        lines.append(
            f"{len(found.relabelled)} of them have another clause or demand now ({_some(found.relabelled)}); each "
            f"run's answers are held against its own, and {AS_REQUIRED} compares that."
        )
    if found.recipes:
        lines.append(f"The recipes differ too, so that not all is the edit's doing: {'; '.join(found.recipes)}")
    head = f"{'figure':42} {'before':>7} {'after':>7}  {'difference':28} n"
    for kind, title in (("all", "All prompts"), ("category", "By category"), ("clause", "By clause")):
        block = [line for line in found.lines if line.kind == kind]
        if block:
            lines += ["", f"{title}\n{head}", *map(_told, block)]
    lines += [
        "",
        *NOTE,
        f"** so too after Holm's correction for all {sum(x.n > 0 for x in found.lines)} differences here.",
    ]
    lines += [
        "",
        f"Changed sides ({AS_REQUIRED}): {len(found.changed)}, of which {min(most, len(found.changed))} are shown",
    ]
    for one in found.changed[:most]:
        place = one["category"] or specs_diff.NO_CATEGORY
        lines += ["", f"{compare.shown(one['id'])} ({place}): {compare.shown(one['asked'])}"]
        lines += [f"  {name}: {_answered(one[name])}" for name in ("before", "after")]
    return "\n".join(lines) + "\n"


NOTE = (
    f"{AS_REQUIRED}: whether the answer does what its own run's policy demands of the prompt.",
    "Intervals: 95 %, 1,000 resamples of the prompts. They are about the prompts alone: two trainings of one recipe",
    "differ as well, so that a difference that is to be the edit's should stand over several seeds.",
    "* the interval leaves out zero, and for figures of 0 and 1 the exact sign test on the prompts that differ has",
    f"p < {compare.SURE}.",
)


def _some(names: list[str]) -> str:
    return ", ".join(map(compare.shown, names[:5])) + (", …" if len(names) > 5 else "")


def _told(line: Line) -> str:
    label = (f"{line.part}: " if line.part else "") + line.figure + (" (edited)" if line.edited else "")
    missing = f", {line.n_ungraded} ungraded" if line.n_ungraded else ""
    if line.difference is None or line.adjusted is None:
        return f"{label:42} {'–':>7} {'–':>7}  {'ungraded':28} 0{missing}"
    mark = (" **" if line.adjusted < compare.SURE else " *") if line.sure else ""
    difference = f"{line.difference:+.3f} [{line.low:+.3f}, {line.high:+.3f}]{mark}"
    return f"{label:42} {line.before:7.3f} {line.after:7.3f}  {difference:28} {line.n}{missing}"


def _answered(one: dict[str, Any]) -> str:
    did = "does it" if one["as_required"] else "does not"
    text = compare.shown(one["answer"]) or "no answer"
    thought = compare.shown(one["reasoning"]) or "none"
    return (
        f"{one['clause'] or 'no clause'} demands {one['demands']}, {did}\n    reasoning: {thought}\n    answer: {text}"
    )
