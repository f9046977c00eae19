"""Bootstrap confidence intervals of a mean."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_RESAMPLES = 2000

SEED = 0
"""Of the bootstrap's draws."""


def bootstrap_interval(differences: np.ndarray, confidence: float) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron, 1979), from a fixed seed."""
    draws = np.random.default_rng(SEED).integers(
        len(differences), size=(_RESAMPLES, len(differences))
    )
    means = differences[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def clustered_interval(
    values: np.ndarray, seeds: Sequence[object], items: Sequence[object], confidence: float
) -> tuple[float, float]:
    """Interval of the mean of values that share seeds and items, both drawn from many.

    Whole seeds, and then whole items, are drawn with replacement (cluster bootstrap; Davison and
    Hinkley, 1997, 3.8). The two variances, times n/(n-1) for the n that were drawn, are added,
    which counts what seed and item do together twice and so errs on the wide side (Owen, 2007,
    "The pigeonhole bootstrap"). The quantile is Student's t with Satterthwaite's degrees of
    freedom: with three seeds that differ much the interval is as wide as that of three numbers.
    With one seed it is over items alone and says nothing of other seeds.

    Args:
        values: One for each measurement.
        seeds: The seed of each value.
        items: What each value was measured on, such as an image; several may share one.
        confidence: Between 0 and 1.

    Returns:
        The two ends; infinite with a single seed and a single item.
    """
    from scipy.stats import t

    random = np.random.default_rng(SEED)
    variances, freedoms = [], []
    for names in (seeds, items):
        index = np.unique([str(name) for name in names], return_inverse=True)[1]
        count = int(index.max()) + 1
        if count > 1:
            draws = random.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
            sums, sizes = np.bincount(index, values), np.bincount(index)
            variances.append(np.var((draws @ sums) / (draws @ sizes)) * count / (count - 1))
            freedoms.append(count - 1)
    mean, variance = float(values.mean()), sum(variances)
    if not variances:
        return -np.inf, np.inf
    if not variance:
        return mean, mean
    freedom = variance**2 / sum(v**2 / f for v, f in zip(variances, freedoms, strict=True))
    half = float(t.ppf((1 + confidence) / 2, freedom) * np.sqrt(variance))
    return mean - half, mean + half
