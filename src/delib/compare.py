"""`delib compare`: two models on the same prompts, figure by figure, with the paired difference and its interval.

In: two sources, each `RUN:ARM` (an arm that a run has evaluated) or the JSON file of `delib eval --json`. Out: a table.
"""

import json
from pathlib import Path

from delib import pipeline
from delib.errors import UserError
from delib.evals.scoring import values
from delib.records import Sample
from delib.run import StageFolder
from delib.stats import paired

Figures = dict[str, tuple[str, dict[str, float | None]]]
"""Prompt id → its source, and figure → value; None is ungraded."""
HEADLINE = ("not_unsafe", "not_overrefuse", "safe_completion_style")


def read(source: str) -> Figures:
    """The figures of each prompt. Raises UserError where there are none."""
    path = Path(source)
    if path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            return {row["id"]: (row["source"], row["figures"]) for row in rows}
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; make it with 'delib eval --json {path}'") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not a file that 'delib eval --json' wrote; make it anew") from None
    name, colon, arm = source.rpartition(":")
    if not colon:
        raise UserError(f"{source}: write RUN:ARM, such as runs/quickstart:sft, or name a file of 'delib eval --json'")
    run = pipeline.open_run(Path(name))
    samples = StageFolder(run.folder("evaluate").path / arm).records(Sample)
    if not samples:
        raise UserError(f"{source}: this run has not evaluated an arm {arm!r}")
    return {s.prompt.id: (s.prompt.source, values(s, run.spec)) for s in samples}


def table(first: str, second: str) -> str:
    """A line a figure: both means over the prompts that both have graded, and second minus first."""
    one, two = read(first), read(second)
    shared = [i for i in one if i in two]
    if not shared:
        raise UserError(f"{first} and {second} share no prompt; compare models on the same prompts")
    lines = [f"first: {first}", f"second: {second}", f"prompts in both: {len(shared)}", ""]
    lines.append(f"{'figure':40} {'first':>7} {'second':>7}  {'difference':24} n")
    lines += _lines(one, two, shared, None)
    sources = list(dict.fromkeys(one[i][0] for i in shared))
    for source in sources if len(sources) > 1 else ():
        lines += _lines(one, two, [i for i in shared if one[i][0] == source], source)
    lines.append("\n* the 95 % interval (1,000 resamples of the prompts) leaves out zero")
    return "\n".join(lines) + "\n"


def _lines(one: Figures, two: Figures, shared: list[str], source: str | None) -> list[str]:
    """A line a figure over all prompts, or the headline figures over those of a source."""
    made = []
    names = HEADLINE if source else list(dict.fromkeys(name for i in shared for name in one[i][1]))
    for name in names:
        found = [(one[i][1].get(name), two[i][1].get(name)) for i in shared]
        pairs = [(a, b) for a, b in found if a is not None and b is not None]
        if not pairs:
            continue
        before, after = [a for a, _ in pairs], [b for _, b in pairs]
        mean, low, high = paired(before, after)
        mark = " *" if low > 0 or high < 0 else ""
        means = f"{sum(before) / len(before):7.3f} {sum(after) / len(after):7.3f}"
        label = f"{name} ({source})" if source else name
        made.append(f"{label:40} {means}  {mean:+.3f} [{low:+.3f}, {high:+.3f}]{mark:3} {len(pairs)}")
    return made
