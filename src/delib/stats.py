"""Figures with their uncertainty: bootstrap intervals and agreement between labellers. Numpy in, floats out."""

import math
from collections.abc import Sequence

import numpy as np

EXACT = 12
"""Prompts or groups that differ, up to which the exchange test takes all ways of exchanging; beyond, it draws DRAWS."""
DRAWS = 10_000
RESAMPLES = 1000
"""Bootstrap resamples, as in the paper (arXiv 2412.16339, evaluations in distribution)."""
SEEN = 1.959964 + 0.841621
"""Quantiles of the normal distribution: two-sided 5 %, and 80 % power."""


def bootstrap(
    values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES, groups: Sequence[str] | None = None
) -> tuple[float, float, float]:
    """Mean of `values` with its percentile 95 % interval, resampling prompts, or whole groups of them.

    All at 0 or all at 1 has no spread to resample: then the interval is Wilson's for a proportion (z = 1.96), n being
    the number of groups. Raises ValueError on no values: a figure of nothing is not a figure.
    """
    if len(values) == 0:
        raise ValueError("no values to average")
    data = np.asarray(values, dtype=float)
    mean = float(data.mean())
    if mean in (0.0, 1.0) and set(np.unique(data)) <= {0.0, 1.0}:
        edge = _wilson(len(data) if groups is None else len(set(groups)))
        return (mean, 0.0, edge) if mean == 0.0 else (mean, 1.0 - edge, 1.0)
    return mean, *_percentiles(data, seed, resamples, groups)


def paired(
    first: Sequence[float],
    second: Sequence[float],
    seed: int = 0,
    resamples: int = RESAMPLES,
    groups: Sequence[str] | None = None,
) -> tuple[float, float, float]:
    """Mean of `second` minus `first`, values of the same prompts in the same order, with its percentile 95 % interval,
    resampling prompts, or whole groups of them.

    Where differences of values of 0 and 1 are all the same there is no spread to resample: then Wilson's width is put
    on either side, within -1 and 1. Raises ValueError on no values or unlike lengths.
    """
    if len(first) != len(second) or len(first) == 0:
        raise ValueError("a paired difference needs the same prompts on both sides")
    data = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    mean = float(data.mean())
    if set(np.unique(data)) in ({0.0}, {1.0}, {-1.0}):
        edge = _wilson(len(data) if groups is None else len(set(groups)))
        return mean, max(-1.0, mean - edge), min(1.0, mean + edge)
    return mean, *_percentiles(data, seed, resamples, groups)


def _wilson(n: int) -> float:
    """Wilson's bound at 0 of n (z = 1.96)."""
    return 1.96**2 / (n + 1.96**2)


def _percentiles(data: np.ndarray, seed: int, resamples: int, groups: Sequence[str] | None) -> tuple[float, float]:
    """The 2.5 and 97.5 % percentiles of the mean when prompts (groups None) or groups are drawn with replacement."""
    number = np.arange(len(data)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    sums, sizes = np.bincount(number, weights=data), np.bincount(number)
    draws = np.random.default_rng(seed).integers(0, len(sums), size=(resamples, len(sums)))
    low, high = np.percentile(sums[draws].sum(axis=1) / sizes[draws].sum(axis=1), [2.5, 97.5])
    return float(low), float(high)


def differ(first: Sequence[float], second: Sequence[float]) -> float:
    """p of the exact two-sided sign test on the pairs that differ (McNemar's, for values of 0 and 1)."""
    from scipy.stats import binomtest

    up = sum(b > a for a, b in zip(first, second, strict=True))
    down = sum(b < a for a, b in zip(first, second, strict=True))
    return float(binomtest(up, up + down).pvalue) if up + down else 1.0


def standard_error(values: Sequence[float], groups: Sequence[str] | None = None) -> float | None:
    """Of the mean of `values`, by the normal approximation; values of one group are one cluster (CR1).

    None where a single prompt or group leaves no spread to see.
    """
    data = np.asarray(values, dtype=float)
    number = np.arange(len(data)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = np.bincount(number, weights=data - data.mean())
    if len(sums) < 2:
        return None
    return float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(data))


def p_value(first: Sequence[float], second: Sequence[float], groups: Sequence[str] | None = None) -> float:
    """Two-sided p of a paired difference of zero: normal, by the standard error with its groups. With few pairs that is
    too small, so it is never below the exact sign test's for values of 0 and 1, nor for others below the exchange
    test's; where there is no spread to see it is that test's."""
    change = [b - a for a, b in zip(first, second, strict=True)]
    shares = set(first) | set(second) <= {0.0, 1.0}
    exact = differ(first, second) if shares else exchanged(change, groups)
    error = standard_error(change, groups)
    if not error:
        return exact
    return max(math.erfc(abs(sum(change) / len(change)) / error / math.sqrt(2)), exact)


def exchanged(change: Sequence[float], groups: Sequence[str] | None = None, seed: int = 0) -> float:
    """Two-sided p of a mean difference of zero, by exchange: were the two sides alike, each prompt's difference (or all
    of a group together) might as well have had the other sign. The share of such exchanges whose mean is as far from
    zero; where they are drawn, what was seen counts as one of them."""
    number = np.arange(len(change)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = np.bincount(number, weights=np.asarray(change, dtype=float))
    sums = sums[np.abs(sums) > 1e-12]
    seen = abs(float(sums.sum())) - 1e-9
    if len(sums) <= EXACT:
        signs = 2 * (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1) - 1
        return float((np.abs(signs @ sums) >= seen).mean())
    draw = np.random.default_rng(seed)
    far = 0
    for part in range(0, DRAWS, RESAMPLES):  # in parts, so that many prompts fit the memory
        signs = 2 * draw.integers(0, 2, size=(min(RESAMPLES, DRAWS - part), len(sums)), dtype=np.int8) - 1
        far += int((np.abs(signs @ sums) >= seen).sum())
    return (far + 1) / (DRAWS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Scand. J. Statist. 6, 1979): p values that stand for the whole family at once."""
    found, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        found[place] = least
    return found


def detectable(
    first: Sequence[float], second: Sequence[float], groups: Sequence[str] | None = None, *, pairs: bool = True
) -> float | None:
    """The smallest difference of means that a study of this size would call one in 80 % of its repetitions, two-sided
    at 5 %: (1.96 + 0.84) standard errors of the difference, paired or not (E. Miller, Adding Error Bars to Evals, arXiv
    2411.00640, section 5, solved for the difference).

    `first` and `second` are values of the same prompts in the same order; `pairs=False` tells what as many other
    prompts for the second would have shown. For values of 0 and 1 a difference d takes at least a share d of pairs that
    differ, and its variance is then at least d; so it is never told below (1.96 + 0.84)² / n, n being the groups, which
    matters where hardly any pair differs. None where there is nothing to tell it from.
    """
    if pairs:
        error = standard_error([b - a for a, b in zip(first, second, strict=True)], groups)
    else:
        both = [standard_error(side, groups) for side in (first, second)]
        error = None if None in both else math.hypot(*(e for e in both if e is not None))
    if error is None:
        return None
    shares = set(first) | set(second) <= {0.0, 1.0}
    least = SEEN**2 / (len(first) if groups is None else len(set(groups))) if shares else 0.0
    return max(SEEN * error, least)


def kappa(first: Sequence[str], second: Sequence[str]) -> float:
    """Cohen's kappa of two labellings of the same items; nan where chance agreement is complete."""
    return float(_kappas(_cells(first, second, [""] * len(first)))[0])


def kappa_interval(
    first: Sequence[str], second: Sequence[str], groups: Sequence[str], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """Percentile 95 % interval of kappa, drawing whole groups of items. `first`: the labels that are taken for true.

    Full agreement has no spread to resample: then the lower end is kappa where agreement is at Wilson's bound, n being
    the number of groups. None where nothing can be told: of one group alone, where a side has one class alone (kappa is
    0 or undefined in every resample), and where more than a fortieth of the resamples have one class of true labels,
    since a percentile could then be one of those.
    """
    cells = _cells(first, second, groups)
    if min(len(cells), len(set(first)), len(set(second))) < 2:
        return None
    draws = np.random.default_rng(seed).integers(0, len(cells), size=(resamples, len(cells)))
    times = np.stack([np.bincount(row, minlength=len(cells)) for row in draws])
    drawn = np.tensordot(times, cells, axes=1)
    defined = (drawn.sum(axis=2) > 0).sum(axis=1) > 1
    if defined.mean() < 0.975:
        return None
    if list(first) == list(second):
        sides = cells.sum(axis=(0, 2)) / len(first)
        return float(1 - _wilson(len(cells)) / (1 - (sides**2).sum())), 1.0
    low, high = np.percentile(_kappas(drawn[defined]), [2.5, 97.5])
    return float(low), float(high)


def _cells(first: Sequence[str], second: Sequence[str], groups: Sequence[str]) -> np.ndarray:
    """How often each pair of labels stands in each group, shape (groups, labels, labels)."""
    labels, number = np.unique([*first, *second], return_inverse=True)
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    cells = np.zeros((len(names), len(labels), len(labels)))
    np.add.at(cells, (group, number[: len(first)], number[len(first) :]), 1)
    return cells


def _kappas(cells: np.ndarray) -> np.ndarray:
    """Kappa of each table of counts, shape (tables, labels, labels); nan where chance agreement is complete."""
    n = cells.sum(axis=(1, 2))
    observed = np.trace(cells, axis1=1, axis2=2) / n
    chance = (cells.sum(axis=1) * cells.sum(axis=2)).sum(axis=1) / n**2
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(chance >= 1.0, np.nan, (observed - chance) / (1.0 - chance)))


def balanced_accuracy(truth: Sequence[bool], predicted: Sequence[bool]) -> float:
    """Mean of the two sides' recalls. Raises ValueError when a side is empty."""
    t, p = np.asarray(truth, dtype=bool), np.asarray(predicted, dtype=bool)
    if t.all() or not t.any():
        raise ValueError("balanced accuracy needs both sides")
    return float(((p[t]).mean() + (~p[~t]).mean()) / 2)
