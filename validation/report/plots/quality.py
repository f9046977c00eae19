"""Plots of a report: quality, training, size and times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from caliport.validation.records.latency import LatencyResult, Spread
from caliport.validation.records.reports import (
    ArtifactResult,
    CompositionResult,
    Point,
    QualityReport,
)
from caliport.validation.report.names import (
    METRIC_NAMES,
    plain_log,
    runtime_index,
    runtime_label,
    size,
)
from caliport.validation.report.plots.drawing import INK, LINE, MUTED, SERIES, legend, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMED = 10


def quality_bars(result: CompositionResult) -> str:
    """ROUGE-L and chrF of every method, one pair of bars each."""

    def draw(figure: Figure, axes: Axes) -> None:
        labels = [m.label for m in result.methods]
        rows = range(len(labels))
        pairs = (("rougeL", SERIES[0], -0.2), ("chrf", SERIES[1], 0.2))
        for name, colour, shift in pairs:
            values = [getattr(m, name) for m in result.methods]
            axes.barh(
                [r + shift for r in rows], values, 0.36, color=colour, label=METRIC_NAMES[name]
            )
        _rows(axes, labels)
        axes.set_xlabel("points, higher is better")
        legend(figure)

    return svg(draw, height=0.9 + 0.36 * len(result.methods))


def quality_bytes(result: CompositionResult, metric: str) -> str:
    """Quality against what must be stored beyond the base and the single-task adapters."""

    def draw(figure: Figure, axes: Axes) -> None:
        stored = [m.bytes for m in result.methods if m.bytes]
        nothing = min(stored, default=1000) / 30  # a logarithm has no place for 0 bytes
        axes.set_xscale("log")
        points = [(m.bytes or nothing, getattr(m, metric), m.label) for m in result.methods]
        for (x, y, _), method in zip(points, result.methods, strict=True):
            best = method.method == result.best
            axes.plot(x, y, "o", color=SERIES[1 if best else 0], markersize=8 if best else 6)
        right = max(stored, default=1000)
        axes.set_xlim(nothing / 3, right * 6)
        _direct_labels(axes, _worth_naming(points), middle=(nothing * right) ** 0.5)
        ticks = [nothing, *_decades(stored)]
        axes.set_xticks(ticks, ["0", *(size(tick) for tick in ticks[1:])])
        axes.minorticks_off()
        axes.set_xlabel("extra storage")
        axes.set_ylabel(METRIC_NAMES[metric])
        axes.margins(y=0.15)

    return svg(draw, grid="both")


def _worth_naming(points: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """All of a few points; of many only those that no other beats in both storage and quality."""
    if len(points) <= _NAMED:
        return points
    return [
        (x, y, name)
        for x, y, name in points
        if not any(a <= x and b >= y and (a, b) != (x, y) for a, b, _ in points)
    ]


def training_curves(report: QualityReport) -> str:
    """Loss over the share of each run's steps: runs of different lengths side by side."""

    def draw(figure: Figure, axes: Axes) -> None:
        from matplotlib.ticker import LogLocator

        for index, (label, curve) in enumerate(report.training.items()):
            style = ("-", "--", ":")[index // len(SERIES) % 3]
            axes.plot(
                [point.step / curve[-1].step for point in curve],
                [point.loss for point in curve],
                style,
                color=SERIES[index % len(SERIES)],
                linewidth=1.6,
                label=f"{label} ({_steps(curve)})",
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.set_xlabel("share of the run's steps")
        axes.set_ylabel("loss, nats a token")
        axes.minorticks_off()
        plain_log(axes)
        legend(figure, columns=2)

    rows = (len(report.training) + 1) // 2
    return svg(draw, height=2.7 + 0.21 * rows, grid="both", empty=not any(report.training.values()))


def sizes(artifacts: Sequence[ArtifactResult]) -> str:
    """Size on disk of every artifact by part, a bundle once for all its compositions."""
    whole = list({(a.path, "" if a.bundle else a.composition): a for a in artifacts}.values())
    stored = [a.parts or {"rest": a.bytes} for a in whole]
    parts = list(dict.fromkeys(part for one in stored for part in one))

    def draw(figure: Figure, axes: Axes) -> None:
        ends = [0.0] * len(whole)
        for index, part in enumerate(parts):
            widths = [one.get(part, 0) / 1e6 for one in stored]
            colour = SERIES[index % len(SERIES)] if part != "rest" else LINE
            axes.barh(range(len(whole)), widths, 0.6, ends, color=colour, label=part)
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
        for row, artifact in enumerate(whole):
            axes.annotate(
                size(artifact.bytes),
                (ends[row], row),
                (5, 0),
                textcoords="offset points",
                va="center",
                color=MUTED,
            )
        _rows(axes, [_whole_name(a, artifacts) for a in whole])
        axes.margins(x=0.18)
        axes.set_xlabel("MB; rest: program, tokenizer and settings")
        legend(figure, columns=4)

    return svg(draw, height=1.1 + 0.32 * len(whole), empty=not artifacts)


def _whole_name(item: ArtifactResult, among: Sequence[ArtifactResult]) -> str:
    return _form(item) if item.bundle else _name(item, among)


def first_token(results: Sequence[LatencyResult]) -> str:
    """Time to the first token: median, its interval, and every round."""
    spreads = [result.first_token_seconds for result in results]
    return _spread_bars(results, spreads, 1e3, "milliseconds")


def decode_rate(results: Sequence[LatencyResult]) -> str:
    """Decode rate: median, its interval, and every round."""
    spreads = [result.decode_rate for result in results]
    return _spread_bars(results, spreads, 1, "tokens a second after the first")


def memory(results: Sequence[LatencyResult]) -> str:
    """Resident memory of each artifact's process at its highest, by what it came with."""
    steps = [(r.idle_bytes or 0, r.load_peak_bytes or 0, r.peak_bytes or 0) for r in results]
    names = ("Python and runtime", "more to load", "more to answer")
    colours = (LINE, SERIES[0], SERIES[1])

    def draw(figure: Figure, axes: Axes) -> None:
        rows = range(len(results))
        ends = [0.0] * len(results)
        for index, (name, colour) in enumerate(zip(names, colours, strict=True)):
            reached = [step[index] / 1e6 for step in steps]
            widths = [max(0.0, now - end) for now, end in zip(reached, ends, strict=True)]
            axes.barh(rows, widths, 0.6, ends, color=colour, label=name)
            ends = [max(pair) for pair in zip(reached, ends, strict=True)]
        _rows(axes, [_name(r, results) for r in results])
        axes.set_xlabel("MB resident at most")
        legend(figure, columns=3)

    missing = all(result.peak_bytes is None for result in results)
    return svg(draw, height=1.1 + 0.32 * len(results), empty=missing)


def _spread_bars(
    results: Sequence[LatencyResult], spreads: Sequence[Spread], scale: float, unit: str
) -> str:
    def draw(figure: Figure, axes: Axes) -> None:
        for row, (result, spread) in enumerate(zip(results, spreads, strict=True)):
            colour = SERIES[2 * runtime_index(result.runtime) % len(SERIES)]
            axes.barh(row, scale * spread.median, 0.6, color=LINE if result.noisy else colour)
            ends = [scale * end for end in spread.interval]
            axes.plot(ends, [row, row], color=INK, linewidth=1.6)
            values = [scale * value for value in spread.values]
            axes.plot(values, [row + 0.2] * len(values), ".", color=INK, markersize=3)
        _rows(axes, [_name(r, results) for r in results])
        axes.set_xlabel(unit)

    return svg(draw, height=0.7 + 0.32 * len(results), empty=not results)


def _name(
    item: ArtifactResult | LatencyResult, among: Sequence[ArtifactResult] | Sequence[LatencyResult]
) -> str:
    several = len({other.composition for other in among}) > 1
    return f"{item.composition}, {_form(item)}" if several else _form(item)


def _form(item: ArtifactResult | LatencyResult) -> str:
    return f"{runtime_label(item.runtime)} {item.form}"


def _steps(curve: Sequence[Point]) -> str:
    return f"{curve[-1].step:,} steps"


def _decades(values: Sequence[int]) -> list[float]:
    """Powers of ten around the values, at most four."""
    low, high = len(str(min(values, default=1000))) - 1, len(str(max(values, default=1000)))
    stride = max(1, -(-(high - low + 1) // 4))
    return [10.0**power for power in range(low, high + 1, stride)]


def _direct_labels(axes: Axes, points: Sequence[tuple[float, float, str]], middle: float) -> None:
    """Write each label right of its point, of those in the right half above it.

    A label moves up where it would cover the one below.
    """
    values = [y for _, y, _ in points]
    gap = (max(values) - min(values) or 1.0) * 0.085
    for left in (True, False):
        last = float("-inf")
        for x, y, label in sorted(
            (p for p in points if (p[0] <= middle) is left), key=lambda p: p[1]
        ):
            last = max(y, last + gap)
            axes.annotate(
                label,
                (x, y),
                (9 if left else 0, 0),
                xycoords="data",
                textcoords="offset points",
                va="center",
                ha="left" if left else "center",
                color=INK,
            ).set_y((0 if left else 11) + (last - y) / gap * 10.5)


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    """One row a label, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
