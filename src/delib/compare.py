"""`delib compare`: models on the same prompts, figure by figure, each against the first, with the paired difference and
its interval.

In: two sources or more, each `RUN:ARM` (an arm that a run has evaluated), the JSON file of `delib eval --json` or the
`.eval` log of a suite; several joined by commas are one model's. Out: a table, on demand the prompts that changed
sides, and rows from which `pareto.py` draws.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from delib import made_with, measure, pipeline
from delib.errors import UserError
from delib.evals import robust
from delib.evals.scoring import HEADLINE, values
from delib.records import Message
from delib.stages.prompts import content_id
from delib.stats import RESAMPLES, detectable, differ, holm, p_value, paired

SURE = 0.05
SIDES = ("not_unsafe", "goodness", "not_overrefuse", "safe_completion_style")
"""Figures whose change from one side of a half to the other is shown."""
SHORT = 300
"""Characters of a prompt or an answer that are shown."""


class Row(NamedTuple):
    """One prompt's figures, or those of one attack on it; None is ungraded. `asked` and `answer` None: not kept, or of
    many answers."""

    source: str
    group: str
    figures: dict[str, float | None]
    asked: str | None = None
    answer: str | None = None


class Line(NamedTuple):
    """One figure of one model against the first."""

    label: str
    pairs: list[tuple[float, float, str]]
    ungraded: int


Rows = dict[str, Row]


def read(source: str) -> Rows:
    """A row for each prompt, by the hash of its conversation. Of parts joined by commas the earlier one's figure counts
    where several have it. Raises UserError where there are no rows."""
    found: Rows = {}
    for part in source.split(","):
        for key, row in _part(part.strip()).items():
            known = found.get(key, row)
            found[key] = known._replace(figures=row.figures | known.figures)
    return found


def _part(source: str) -> Rows:
    path = Path(source)
    if path.suffix == ".eval":
        return _rows(measure.rows_of(measure.read_log(path)))
    if path.suffix == ".json" and not path.is_dir():
        try:
            return _rows(json.loads(path.read_text(encoding="utf-8"))["rows"])
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; make it with 'delib eval --json {path}'") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not a file that 'delib eval --json' wrote; make it anew") from None
    name, colon, arm = source.rpartition(":")
    if not colon:
        raise UserError(
            f"{source}: write RUN:ARM, such as runs/quickstart:sft, or name a log or a file of 'delib eval --json'"
        )
    run = pipeline.open_run(Path(name))
    answers = run.answers()
    if arm not in answers:
        raise UserError(f"{source}: this run has evaluated {', '.join(answers)}, and no arm {arm!r}")
    spec = made_with.spec_for(Path(name), "evaluate") or run.spec
    return {
        content_id(s.prompt): Row(
            s.prompt.source,
            s.prompt.group or s.prompt.id,
            values(s, spec),
            _asked(s.prompt.messages),
            s.completion.answer if s.completion else None,
        )
        for s in answers[arm]
    }


class About(NamedTuple):
    """Who judged a source, and how many resamples its suites ask for."""

    judge: str
    resamples: int


def about(source: str) -> About:
    """Who judged what `read` reads."""
    found = [_about(part.strip()) for part in source.split(",")]
    judges = dict.fromkeys(str(kept.get("judge") or "by rule") for kept in found)
    return About(", ".join(judges), max(int(kept.get("resamples", RESAMPLES)) for kept in found))


def _about(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.suffix == ".eval":
        return measure.about_of(measure.read_log(path, header_only=True))
    if path.suffix == ".json" and not path.is_dir():
        kept = json.loads(path.read_text(encoding="utf-8")).get("about")
        return kept if isinstance(kept, dict) else {"judge": "not told"}
    return {"judge": made_with.recipe_of(Path(source.rpartition(":")[0]), "evaluate").judge}


def _rows(given: list[dict[str, Any]]) -> Rows:
    """The rows of a file: tries of one prompt (epochs) as their mean; where prompts were asked under many attacks each
    of these on its own, and by prompt what `robust.by_prompt` tells."""
    tries: dict[str, list[dict[str, Any]]] = {}
    for row in given:
        tries.setdefault(f"{row['prompt']}@{row['under']}" if row.get("under") else row["prompt"], []).append(row)
    found = {key: _row(rows) for key, rows in tries.items()}
    many = [row for row in given if row.get("under")]
    for figure, told in robust.by_prompt([(r["prompt"], r["under"], r["figures"]) for r in many]).items():
        first = {row["prompt"]: row for row in reversed(many)}
        for prompt, value in told.items():
            row = first[prompt]
            found.setdefault(prompt, Row(row["source"], row["group"], {}, _asked(row.get("messages"))))
            found[prompt].figures[figure] = value
    return found


def _row(rows: list[dict[str, Any]]) -> Row:
    figures: dict[str, float | None] = {}
    for name in dict.fromkeys(name for row in rows for name in row["figures"]):
        graded = [v for row in rows if (v := row["figures"].get(name)) is not None]
        figures[name] = sum(graded) / len(graded) if graded else None
    one = rows[0]
    return Row(one["source"], one["group"], figures, _asked(one.get("messages")), one.get("answer"))


def _asked(messages: Iterable[Any] | None) -> str | None:
    turns = [Message.model_validate(m) for m in messages or ()]
    return turns[-1].content if turns else None


def table(sources: list[str], models: list[Rows]) -> str:
    """For each source after the first a line a figure: both means over the prompts that both have graded, and the
    difference. Raises UserError where two share no prompt."""
    first = models[0]
    who = [about(source) for source in sources]
    resamples = max(one.resamples for one in who)
    blocks = []
    for source, other in zip(sources[1:], models[1:], strict=True):
        shared = [i for i in first if i in other]
        if not shared:
            raise UserError(f"{sources[0]} and {source} share no prompt; compare models on the same prompts")
        lines = _lines(first, other, shared, None)
        kinds = list(dict.fromkeys(first[i].source for i in shared))
        for kind in kinds if len(kinds) > 1 else ():
            lines += _lines(first, other, [i for i in shared if first[i].source == kind], kind)
        blocks.append((source, len(shared), lines))
    judges = dict(zip(sources, (one.judge for one in who), strict=True))
    tests = [line for _, _, lines in blocks for line in lines if line.pairs]
    adjusted = dict(zip(map(id, tests), holm([_p(line) for line in tests]), strict=True))
    told = []
    for source, count, lines in blocks:
        told += [f"first: {sources[0]}", f"second: {source}", f"prompts in both: {count}"]
        told += _judged(judges[sources[0]], judges[source])
        told.append(f"{'figure':40} {'first':>7} {'second':>7}  {'difference':28} {'detectable':14} n")
        told += [*(_told(line, adjusted.get(id(line), 1.0), resamples) for line in lines), ""]
    told.append(
        f"Intervals: 95 %, {resamples:,} resamples of the prompts, those made from one another together.\n"
        "* the interval leaves out zero, and for figures of 0 and 1 the exact sign test on the prompts that differ\n"
        f"has p < {SURE}. Of many figures looked at together one in twenty gets its star by chance.\n"
        f"** so too after Holm's correction for all {len(tests)} differences shown here.\n"
        "detectable: the smallest difference that as many prompts show four times in five, where none was found; in\n"
        "brackets, if the second model had been asked as many other prompts."
    )
    return "\n".join(told) + "\n"


def _judged(first: str, second: str) -> list[str]:
    if first == second:
        return [f"judge: {first}", ""]
    return [f"judges: {first}; {second}. A difference in judged figures may be theirs and not the models'.", ""]


def _lines(one: Rows, two: Rows, shared: list[str], source: str | None) -> list[Line]:
    """A line a figure over all prompts, or the headline figures over those of a source."""
    made = []
    for name in HEADLINE if source else list(dict.fromkeys(name for i in shared for name in one[i].figures)):
        about = [(one[i], two[i]) for i in shared if name in one[i].figures and name in two[i].figures]
        both = [(a.figures[name], b.figures[name], a.group) for a, b in about]
        pairs = [(a, b, group) for a, b, group in both if a is not None and b is not None]
        if about:
            made.append(Line(f"{name} ({source})" if source else name, pairs, len(about) - len(pairs)))
    return made


def _p(line: Line) -> float:
    before, after, groups = zip(*line.pairs, strict=True)
    return p_value(before, after, groups)


def _told(line: Line, adjusted: float, resamples: int) -> str:
    missing = f", {line.ungraded} ungraded" if line.ungraded else ""
    if not line.pairs:
        return f"{line.label:40} {'–':>7} {'–':>7}  {'ungraded':28} {'':14} 0{missing}"
    before, after, groups = (list(part) for part in zip(*line.pairs, strict=True))
    mean, low, high = paired(before, after, resamples=resamples, groups=groups)
    shares = set(before + after) <= {0.0, 1.0}
    sure = (low > 0 or high < 0) and (not shares or differ(before, after) < SURE)
    mark = (" **" if adjusted < SURE else " *") if sure else ""
    means = f"{sum(before) / len(before):7.3f} {sum(after) / len(after):7.3f}"
    difference = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]{mark}"
    found = "" if sure else _detectable(before, after, groups, shares)
    return f"{line.label:40} {means}  {difference:28} {found:14} {len(line.pairs)}{missing}"


def _detectable(before: list[float], after: list[float], groups: list[str], shares: bool) -> str:
    both = [detectable(before, after, groups, pairs=pairs) for pairs in (True, False)]
    pairs, apart = ("–" if d is None else "> 1" if shares and d > 1 else f"{d:.3f}" for d in both)
    return f"{pairs} ({apart})"


def changed(sources: list[str], models: list[Rows], most: int) -> str:
    """The first `most` prompts of each model that changed sides against the first, with both answers."""
    told = []
    for source, other in zip(sources[1:], models[1:], strict=True):
        moved = [
            (name, key, before, after)
            for name in SIDES
            for key in models[0]
            if key in other
            and (before := models[0][key].figures.get(name)) is not None
            and (after := other[key].figures.get(name)) is not None
            and (before >= 0.5) != (after >= 0.5)
        ]
        told.append(f"\nchanged sides, {sources[0]} against {source}: {len(moved)}, of which {min(most, len(moved))}:")
        for name, key, before, after in moved[:most]:
            told.append(f"\n{name} {before:g} → {after:g}: {shown(models[0][key].asked) or key}")
            told += [
                f"  {label}: {shown(rows[key].answer)}" for label, rows in (("first", models[0]), ("second", other))
            ]
    return "\n".join(told) + "\n"


def shown(text: str | None) -> str:
    """A text in one line, without anything that a terminal would obey, shortened."""
    flat = " ".join((text or "").split())
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in flat[: SHORT + 1])
    return safe if len(flat) <= SHORT else safe[:SHORT] + "…"
