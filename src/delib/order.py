"""The arms of an ablation against one another, over prompts and seeds, and whether the paper's order holds.

In: for each arm and seed the figures of each prompt. Out: each arm's figures, paired differences with Holm's
correction, and for each figure what became of the order (arXiv 2412.16339: both above SFT alone and RL alone, each of
these above neither, and the spec in context below both).
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from delib.evals.scoring import metric
from delib.records import Metric
from delib.stats import holm, p_value, paired

SURE = 0.05
CLAIMS = (("sft", "rl"), ("rl_only", "rl"), ("base", "sft"), ("base", "rl_only"), ("base_spec", "rl"))
"""The paper's order: the second arm of each pair above the first."""
PAIRS = (*CLAIMS, ("cold_start", "rl_only"))
"""All that is compared; the last tells what RL adds to the form, of which the paper says nothing."""


class Row(NamedTuple):
    """One prompt's figures; None is ungraded. `group`: prompts made from one another, resampled together."""

    group: str
    figures: dict[str, float | None]


Rows = dict[str, Row]
"""By prompt."""
Arms = Mapping[str, Sequence[Rows]]
"""By arm; one Rows a seed, in the same order for all arms."""


class Difference(NamedTuple):
    """A figure of arm `second` less that of arm `first`, on the prompts that both have graded.

    `n` and `n_ungraded` count prompts: those with a seed in which both arms are graded, and those without, which are
    left out. `mean`, `low` and `high` are of each prompt's mean over the seeds that have it graded, prompts resampled;
    `by_seed` is one mean a seed. `p` takes the seeds of a prompt together (`stats.exchanged`); `adjusted` is p after
    Holm's correction for all differences that were told together.
    """

    figure: str
    first: str
    second: str
    mean: float
    low: float
    high: float
    n: int
    n_ungraded: int
    by_seed: list[float]
    p: float
    adjusted: float = 1.0

    @property
    def shown(self) -> bool:
        """Whether it is told apart from chance: the interval leaves out zero, and p stands Holm's correction."""
        return (self.low > 0 or self.high < 0) and self.adjusted < SURE


def level(figure: str, arm: str, rows: Rows, by: dict[str, str]) -> Metric | None:
    """An arm's figure with its interval over prompts; None where it is about no prompt."""
    about = [(row.figures[figure], row.group) for row in rows.values() if figure in row.figures]
    return metric("heldout", arm, figure, about, by) if about else None


def difference(
    figure: str, first: str, second: str, before: Sequence[Rows], after: Sequence[Rows]
) -> Difference | None:
    """`after` less `before`, a Rows a seed on either side; None where no prompt has both graded in the same seed."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    groups: dict[str, str] = {}
    by_seed, asked = [], set[str]()
    for one, two in zip(before, after, strict=True):
        changes = []
        for prompt, row in one.items():
            if figure not in row.figures or prompt not in two or figure not in two[prompt].figures:
                continue
            asked.add(prompt)
            a, b = row.figures[figure], two[prompt].figures[figure]
            if a is None or b is None:
                continue
            changes.append(b - a)
            pairs.setdefault(prompt, []).append((a, b))
            groups[prompt] = row.group
        by_seed += [fmean(changes)] if changes else []
    if not pairs:
        return None
    ones = [fmean(a for a, _ in found) for found in pairs.values()]
    twos = [fmean(b for _, b in found) for found in pairs.values()]
    together = [groups[prompt] for prompt in pairs]
    mean, low, high = paired(ones, twos, groups=together)
    p = p_value(ones, twos, together)
    return Difference(figure, first, second, mean, low, high, len(pairs), len(asked) - len(pairs), by_seed, p)


def differences(figures: Sequence[str], arms: Arms) -> list[Difference]:
    """Every pair of arms on every figure, adjusted for all of them together."""
    found = [
        made
        for figure in figures
        for first, second in PAIRS
        if (made := difference(figure, first, second, arms[first], arms[second])) is not None
    ]
    return [d._replace(adjusted=p) for d, p in zip(found, holm([d.p for d in found]), strict=True)]


def verdict(claims: Sequence[Difference | None], names: Mapping[str, str]) -> str:
    """What became of the order on one figure; `claims` as in CLAIMS."""
    pairs = [(f"{names[two]} > {names[one]}", d) for (one, two), d in zip(CLAIMS, claims, strict=True)]
    against = [f"{claim} ({'shown' if d.shown else 'within chance'})" for claim, d in pairs if d and d.mean < 0]
    equal = [f"{claim} (equal)" for claim, d in pairs if d and d.mean == 0]
    if len(equal) == len(CLAIMS):
        return "does not hold: all equal"
    if against or equal:
        return f"does not hold: not {', not '.join([*against, *equal])}"
    if None in claims:
        return f"not told: no prompt graded for {', '.join(claim for claim, d in pairs if d is None)}"
    chance = [claim for claim, d in pairs if d and not d.shown]
    return f"holds in the means; within chance: {', '.join(chance)}" if chance else "holds"


def mean_and_range(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, least and most over seeds; None where a seed has no figure."""
    known = [v for v in values if v is not None]
    if not known or len(known) < len(values):
        return None
    return {"mean": fmean(known), "least": min(known), "most": max(known)}
