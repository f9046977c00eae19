"""A figure in two runs: how it is shown, and whether its change is more than noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from caliport.validation.records.latency import LatencyResult, Spread

V = TypeVar("V")
TONES = {
    "same": "",
    "better": "better",
    "worse": "worse",
    "noise": "within noise",
    "noisy": "too noisy to compare",
    "other": "timed with other threads or lengths",
}
"""What is said of a difference, and how it is shown."""


@dataclass(frozen=True)
class Figure:
    """One figure in both runs, for people.

    Attributes:
        label: What it is, with its unit.
        before, after: As shown; a dash where a run does not have it.
        change: The difference, empty where there is none to speak of.
        tone: Of ``TONES``; same where nothing is to be said.
    """

    label: str
    before: str
    after: str
    change: str = ""
    tone: str = "same"


def change_figure(
    label: str,
    values: Sequence[float | None],
    show: Callable[[float], str],
    *,
    more_is_better: bool = False,
    relative: bool = False,
) -> Figure:
    """Two values, the same where they are shown alike."""
    was, now = values
    shown = shown_both(values, show)
    if was is None or now is None or shown[0] == shown[1]:
        return Figure(label, *shown)
    change = f"{now / was - 1:+.1%}" if relative and was else f"{now - was:+.3g}"
    tone = "better" if (now > was) is more_is_better else "worse"
    return Figure(label, *shown, change=change, tone=tone)


def shown_both(values: Sequence[V | None], show: Callable[[V], str]) -> tuple[str, str]:
    """Two values as they are shown; a dash for one that is not there."""
    first, second = ("–" if value is None else show(value) for value in values)
    return first, second


def timed_figure(
    label: str,
    both: Sequence[LatencyResult | None],
    spreads: Sequence[Spread | None],
    show: Callable[[float], str],
    *,
    more_is_better: bool = False,
) -> Figure:
    """A measured time or rate: within noise where the intervals of both medians explain it."""
    shown = shown_both(
        spreads, lambda s: f"{show(s.median)} ({show(s.interval[0])} to {show(s.interval[1])})"
    )
    (old, new), (was, now) = both, spreads
    if old is None or new is None or was is None or now is None or was == now:
        return Figure(label, *shown)
    change = now.median / was.median - 1
    if _course(old) != _course(new):
        return Figure(label, *shown, change=f"{change:+.1%}", tone="other")
    if old.noisy or new.noisy:
        return Figure(label, *shown, change=f"{change:+.1%}", tone="noisy")
    widths = [(s.interval[1] - s.interval[0]) / 2 / s.median for s in (was, now)]
    noise = math.hypot(*widths)
    tone = "better" if (change > 0) is more_is_better else "worse"
    if abs(change) <= noise:
        tone = "noise"
    return Figure(label, *shown, change=f"{change:+.1%} (noise {noise:.1%})", tone=tone)


def _course(time: LatencyResult) -> tuple[int, int, int]:
    return time.threads, time.prompt_tokens, time.new_tokens


def scientific(value: float) -> str:
    """A number of any magnitude in three digits."""
    return f"{value:.3g}"
