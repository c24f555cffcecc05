"""`delib compare`: two models on the same prompts, figure by figure, with the paired difference and its interval.

In: two sources, each `RUN:ARM` (an arm that a run has evaluated) or the JSON file of `delib eval --json`. Out: a table.
"""

import json
from pathlib import Path
from typing import NamedTuple

from delib import pipeline
from delib.errors import UserError
from delib.evals.scoring import values
from delib.stages.prompts import content_id
from delib.stats import differ, paired

HEADLINE = ("not_unsafe", "not_overrefuse", "safe_completion_style")
"""The figures that are also told by source."""
SURE = 0.05


class Row(NamedTuple):
    """One prompt's figures; None is ungraded."""

    source: str
    group: str
    figures: dict[str, float | None]


def read(source: str) -> dict[str, Row]:
    """A row for each prompt, by the hash of its conversation. Raises UserError where there are none."""
    path = Path(source)
    if path.suffix == ".json" and not path.is_dir():
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            return {r["prompt"]: Row(r["source"], r["group"], dict(r["figures"])) for r in rows}
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; make it with 'delib eval --json {path}'") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not a file that 'delib eval --json' wrote; make it anew") from None
    name, colon, arm = source.rpartition(":")
    if not colon:
        raise UserError(f"{source}: write RUN:ARM, such as runs/quickstart:sft, or name a file of 'delib eval --json'")
    run = pipeline.open_run(Path(name))
    answers = run.answers()
    if arm not in answers:
        raise UserError(f"{source}: this run has evaluated {', '.join(answers)}, and no arm {arm!r}")
    return {
        content_id(s.prompt): Row(s.prompt.source, s.prompt.group or s.prompt.id, values(s, run.spec))
        for s in answers[arm]
    }


def table(first: str, second: str) -> str:
    """A line a figure: both means over the prompts that both have graded, and second minus first."""
    one, two = read(first), read(second)
    shared = [i for i in one if i in two]
    if not shared:
        raise UserError(f"{first} and {second} share no prompt; compare models on the same prompts")
    lines = [f"first: {first}", f"second: {second}", f"prompts in both: {len(shared)}", ""]
    lines.append(f"{'figure':40} {'first':>7} {'second':>7}  {'difference':26} n")
    lines += _lines(one, two, shared, None)
    sources = list(dict.fromkeys(one[i].source for i in shared))
    for source in sources if len(sources) > 1 else ():
        lines += _lines(one, two, [i for i in shared if one[i].source == source], source)
    lines.append(
        "\nIntervals: 95 %, 1,000 resamples of the prompts, those made from one another together.\n"
        "* the interval leaves out zero, and for figures of 0 and 1 the exact sign test on the prompts that differ\n"
        f"has p < {SURE}. Of many figures looked at together one in twenty gets its star by chance."
    )
    return "\n".join(lines) + "\n"


def _lines(one: dict[str, Row], two: dict[str, Row], shared: list[str], source: str | None) -> list[str]:
    """A line a figure over all prompts, or the headline figures over those of a source."""
    made = []
    for name in HEADLINE if source else list(dict.fromkeys(name for i in shared for name in one[i].figures)):
        about = [(one[i], two[i]) for i in shared if name in one[i].figures and name in two[i].figures]
        both = [(a.figures[name], b.figures[name], a.group) for a, b in about]
        pairs = [(a, b, group) for a, b, group in both if a is not None and b is not None]
        label = f"{name} ({source})" if source else name
        if about and not pairs:
            made.append(f"{label:40} {'–':>7} {'–':>7}  {'ungraded':26} 0, {len(about)} ungraded")
        if not pairs:
            continue
        before, after = [a for a, _, _ in pairs], [b for _, b, _ in pairs]
        mean, low, high = paired(before, after, groups=[group for _, _, group in pairs])
        sure = (low > 0 or high < 0) and (not set(before + after) <= {0.0, 1.0} or differ(before, after) < SURE)
        means = f"{sum(before) / len(before):7.3f} {sum(after) / len(after):7.3f}"
        shown = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]{' *' if sure else ''}"
        missing = f", {len(about) - len(pairs)} ungraded" if len(pairs) < len(about) else ""
        made.append(f"{label:40} {means}  {shown:26} {len(pairs)}{missing}")
    return made
