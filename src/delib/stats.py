"""Figures with their uncertainty: bootstrap intervals and agreement between labellers. Numpy in, floats out."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000
"""Bootstrap resamples, as in the paper (arXiv 2412.16339, evaluations in distribution)."""


def bootstrap(values: Sequence[float], seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float, float]:
    """Mean of `values` with its percentile 95 % interval, resampling prompts.

    All at 0 or all at 1 has no spread to resample: then the interval is Wilson's for a proportion (z = 1.96).
    Raises ValueError on no values: a figure of nothing is not a figure.
    """
    if len(values) == 0:
        raise ValueError("no values to average")
    data = np.asarray(values, dtype=float)
    mean, n = float(data.mean()), len(data)
    if mean in (0.0, 1.0) and set(np.unique(data)) <= {0.0, 1.0}:
        z2 = 1.96**2
        edge = z2 / (n + z2)
        return (mean, 0.0, edge) if mean == 0.0 else (mean, 1.0 - edge, 1.0)
    draws = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    low, high = np.percentile(data[draws].mean(axis=1), [2.5, 97.5])
    return mean, float(low), float(high)


def paired(
    first: Sequence[float], second: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Mean of `second` minus `first`, values of the same prompts in the same order, with its percentile 95 % interval,
    resampling prompts. Where no two differences differ there is no spread to resample: then Wilson's width for n is
    put on either side. Raises ValueError on no values or unlike lengths.
    """
    if len(first) != len(second) or len(first) == 0:
        raise ValueError("a paired difference needs the same prompts on both sides")
    data = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    mean, n = float(data.mean()), len(data)
    if np.ptp(data) == 0.0:
        edge = 1.96**2 / (n + 1.96**2)
        return mean, mean - edge, mean + edge
    draws = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    low, high = np.percentile(data[draws].mean(axis=1), [2.5, 97.5])
    return mean, float(low), float(high)


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
