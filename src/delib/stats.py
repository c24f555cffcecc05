"""Figures with their uncertainty: bootstrap intervals and agreement between labellers. Numpy in, floats out."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000
"""Bootstrap resamples, as in the paper (arXiv 2412.16339, evaluations in distribution)."""


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


def kappa(first: Sequence[str], second: Sequence[str]) -> float:
    """Cohen's kappa of two labellings of the same items; nan where chance agreement is complete."""
    labels = sorted(set(first) | set(second))
    a, b = np.asarray(first), np.asarray(second)
    observed = float((a == b).mean())
    chance = sum(float((a == x).mean()) * float((b == x).mean()) for x in labels)
    return float("nan") if chance >= 1.0 else (observed - chance) / (1.0 - chance)


def balanced_accuracy(truth: Sequence[bool], predicted: Sequence[bool]) -> float:
    """Mean of the two sides' recalls. Raises ValueError when a side is empty."""
    t, p = np.asarray(truth, dtype=bool), np.asarray(predicted, dtype=bool)
    if t.all() or not t.any():
        raise ValueError("balanced accuracy needs both sides")
    return float(((p[t]).mean() + (~p[~t]).mean()) / 2)
