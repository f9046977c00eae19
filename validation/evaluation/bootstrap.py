"""Bootstrap confidence interval of a mean."""

from __future__ import annotations

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
