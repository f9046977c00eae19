"""Medians with intervals that hold for any distribution, and when times are too noisy to say."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import median, quantiles

from caliport.validation.records.latency import LatencyResult, Spread

LEVEL = 0.95
_NOISY = 0.1  # of the median: the middle half of the same work's times
_WIDE = 0.2  # of the median: an interval that holds it
_FEW = 0.5  # level of an interval from two values


def median_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float, float]:
    """An interval for the median of whatever the values are drawn from, by order statistics.

    The k-th lowest and the k-th highest of n independent values enclose the median unless fewer
    than k fall on one side of it; the side of each is a coin's toss (Conover, Practical
    Nonparametric Statistics, 3.2).

    Args:
        values: At least one.
        level: Wanted probability that the interval holds the median.

    Returns:
        Low, high, and the probability reached: ``level`` at least, except where even the lowest
        and the highest value reach less.
    """
    ordered, count = sorted(values), len(values)
    tail = 0.5**count
    k = 1
    while k < (count + 1) // 2:
        wider = tail + comb(count, k) * 0.5**count
        if 1 - 2 * wider < level:
            break
        tail, k = wider, k + 1
    return ordered[k - 1], ordered[-k], 1 - 2 * tail


def spread(values: Sequence[float]) -> Spread:
    """Median, range and interval of at least one value."""
    low, high, level = median_interval(values)
    return Spread(
        median=median(values),
        low=min(values),
        high=max(values),
        interval=(low, high),
        level=level,
        values=tuple(values),
    )


def ratio(one: LatencyResult, other: LatencyResult, field: str) -> Spread | None:
    """How many times ``one`` is ``other`` in a field, from the rounds that both had a turn in.

    Both of a round met the same machine, so the ratio is taken in each round first. None where one
    of the two is too noisy.
    """
    if one.noisy or other.noisy:
        return None
    pairs = zip(getattr(one, field).values, getattr(other, field).values, strict=True)
    return spread([mine / theirs for mine, theirs in pairs])


def machine_noise(calibration: Spread) -> str | None:
    """Why a machine is too noisy to compare anything on: the same work took unequal times."""
    if len(calibration.values) < 2:
        return None
    first, _, third = quantiles(calibration.values, n=4, method="inclusive")
    if third - first <= _NOISY * calibration.median:
        return None
    return (
        f"half of the times of the same work lie between {1e3 * first:.3g} and "
        f"{1e3 * third:.3g} ms, expected within {_NOISY:.0%} of their median"
    )


def artifact_noise(first_token: Spread, decode_rate: Spread) -> str | None:
    """Why an artifact's own times cannot be compared: their median is too uncertain."""
    for what, found in (("time to first token", first_token), ("decode rate", decode_rate)):
        low, high = found.interval
        if found.level < _FEW:
            return f"{what}: {len(found.values)} value, expected 2 or more"
        if high - low > _WIDE * found.median:
            return (
                f"{what}: the median's interval is {(high - low) / found.median:.0%} of it wide, "
                f"expected {_WIDE:.0%} at most"
            )
    return None
