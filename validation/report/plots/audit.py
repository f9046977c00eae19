"""Plots of an audit over the layers: errors of merges, overlap of adapters, norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from caliport.validation.records.audit import CompositionAudit
from caliport.validation.report.audit_summary import Summary, applied, summaries
from caliport.validation.report.plots.drawing import MUTED, SERIES, legend, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*"
_OVERLAPS: dict[str, Callable[[Summary], float | None]] = {
    "column spaces": lambda s: s.columns.mean if s.columns else None,
    "row spaces": lambda s: s.rows.mean if s.rows else None,
    "ΔW": lambda s: s.cosine,
}


def merge_errors(audit: CompositionAudit) -> str:
    """Relative error of every merge in each layer; at 1 the merge is no closer than nothing."""
    layers = _layers(audit)

    def draw(figure: Figure, axes: Axes) -> None:
        for index, merge in enumerate(applied(audit)):
            _line(axes, {layer: s.errors[merge] for layer, s in layers.items()}, index, merge)
        axes.axhline(1, color=MUTED, linewidth=1, linestyle=":")
        axes.annotate(
            "no adapter at all",
            (1, 1),
            (0, 6),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            color=MUTED,
            fontsize=9,
        )
        axes.set_ylim(-0.05, max(1.2, axes.get_ylim()[1]))
        axes.set_ylabel("relative error, 0 is exact")
        _finish(figure, axes, layers, columns)

    merges = len(applied(audit))
    columns = 4 if merges <= 4 else 3
    rows = -(-merges // columns)
    return svg(draw, height=2.6 + 0.21 * rows, grid="both", empty=not layers or not rows)


def overlap(audit: CompositionAudit) -> str:
    """Mean cosines between the adapters in each layer, with what random spaces would have."""
    layers = {layer: s for layer, s in _layers(audit).items() if s.cosine is not None}

    def draw(figure: Figure, axes: Axes) -> None:
        for index, (label, pick) in enumerate(_OVERLAPS.items()):
            _line(axes, {layer: pick(s) for layer, s in layers.items()}, index, label)
        chance = [
            (SERIES[0], [s.columns.chance for s in layers.values() if s.columns]),
            (SERIES[1], [s.rows.chance for s in layers.values() if s.rows]),
        ]
        for colour, values in chance:
            axes.plot(list(layers), values, ":", color=colour, linewidth=1.4)
        axes.plot([], [], ":", color=MUTED, linewidth=1.4, label="at most by chance")
        axes.set_ylabel("cosine, 1 is the same")
        axes.set_ylim(min(0, axes.get_ylim()[0]), max(1, axes.get_ylim()[1]))
        _finish(figure, axes, layers)

    return svg(draw, height=2.81, grid="both", empty=not layers)


def norms(audit: CompositionAudit) -> str:
    """Mean Frobenius norm of each adapter's ΔW in each layer."""
    layers = _layers(audit)

    def draw(figure: Figure, axes: Axes) -> None:
        for index, name in enumerate(audit.weights):
            found = {layer: s.adapters.get(name) for layer, s in layers.items()}
            sizes = {layer: part.norm if part else None for layer, part in found.items()}
            _line(axes, sizes, index, name)
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.set_ylabel("mean norm of ΔW")
        _finish(figure, axes, layers, columns=2)

    rows = (len(audit.weights) + 1) // 2
    return svg(draw, height=2.6 + 0.21 * rows, grid="both", empty=not layers)


def _layers(audit: CompositionAudit) -> dict[int, Summary]:
    """By layer; modules outside of layers, such as a head, have no place on the axis."""
    found = summaries(audit, lambda module: module.layer)
    return {layer: s for layer, s in sorted(found.items(), key=_place) if layer is not None}


def _place(item: tuple[int | None, Summary]) -> int:
    return -1 if item[0] is None else item[0]


def _line(axes: Axes, values: Mapping[int, float | None], index: int, label: str) -> None:
    kept = [(layer, value) for layer, value in values.items() if value is not None]
    axes.plot(
        [layer for layer, _ in kept],
        [value for _, value in kept],
        marker=_MARKERS[index % len(_MARKERS)],
        color=SERIES[index % len(SERIES)],
        markersize=5,
        linewidth=1.4,
        label=label,
    )


def _finish(figure: Figure, axes: Axes, layers: Iterable[int], columns: int = 4) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.set_xlim(min(layers) - 0.3, max(layers) + 0.3)
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    legend(figure, columns)
