"""Plots of an error budget: where on the way from the adapters to the artifact accuracy went."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from caliport.validation.records.budget import Budget, BudgetStage
from caliport.validation.report.budget_summary import (
    STAGES,
    changes,
    forms,
    metric_name,
    shown_form,
    stages_of,
)
from caliport.validation.report.names import number, plain_log, runtime_index
from caliport.validation.report.plots.drawing import FAIL, INK, LINE, MUTED, SERIES, legend, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FLOOR = 1e-9  # nats, or relative distance; what is less is drawn there
_WRAPPED = {
    "exact sum": "exact\nsum",
    "calibration": "cali-\nbration",
    "quantized eager": "quantized\neager",
}
_NAMED = 8  # forms that find room to be named at their lines' ends
_PRECISIONS = {"fp32": SERIES[2], "int8": SERIES[0], "int4": SERIES[1]}
_MARKERS = "os^Dv"  # by runtime
_DASHES = {"quantized eager": "-", "artifact": "--", "device": ":"}


def task_of_stages(budget: Budget) -> str:
    """The task metric after each stage: one line that fans out into one a form.

    Returns:
        An ``<svg>``; nothing without a task metric, or where the forms share one stage alone.
    """
    return "" if len(stages_of(budget)) < 2 else _ways(budget, {}, start=0, named=False)


def task_of_forms(budget: Budget, lost: Mapping[str, str]) -> str:
    """The same from the last shared stage on, each form by name.

    Args:
        budget: Of one composition.
        lost: For each form that failed a gate the stage where it was lost.

    Returns:
        An ``<svg>``; nothing without a task metric.
    """
    return _ways(budget, lost, start=len(stages_of(budget)) - 1, named=True)


def kl_of_stages(budget: Budget, lost: Mapping[str, str]) -> str:
    """KL of each stage against the one before, on a logarithmic axis."""
    found = [change.stage for change in changes(budget) if change.stage.previous is not None]
    places = _places(found)
    among = forms(budget)

    def draw(figure: Figure, axes: Axes) -> None:
        axes.set_yscale("log")
        values = [_kl(stage) for stage in found]
        bottom = min(values) / 3
        for stage, value in zip(found, values, strict=True):
            slot = (among.index(stage.form) - (len(among) - 1) / 2) if stage.form else 0.0
            x = places[stage.stage] + 0.8 * slot / max(len(among), 4)
            wrong = bool(stage.form) and lost.get(stage.form) == stage.stage
            look = _look(stage.form)
            axes.plot([x, x], [bottom, value], color=FAIL if wrong else LINE, linewidth=1.4)
            axes.plot([x], [value], linestyle="", **look, markersize=7)
            if wrong:
                _note(axes, f"✕ {_shown(value)}", x, value, FAIL)
        for name, x in places.items():
            most = max((s for s in found if s.stage == name), key=_kl)
            if lost.get(most.form) != name:
                _note(axes, _shown(_kl(most)), x, _kl(most), INK)
        _log_axis(axes, values)
        axes.set_ylim(bottom, max(values) * 30)
        _stage_axis(axes, places)
        axes.set_ylabel("KL in nats a token")
        _forms_legend(figure, axes, among)

    return svg(draw, height=2.9 + 0.2 * -(-len(among) // 2), grid="y", empty=not found)


def along_positions(budget: Budget) -> str:
    """KL of each stage against the one before at each position of the answer."""
    return _along(
        budget, lambda stage: stage.by_position, 1, "token of the answer", "KL in nats a token"
    )


def along_layers(budget: Budget) -> str:
    """Distance of the residual stream from that of the stage before, after each layer."""
    return _along(
        budget, lambda stage: stage.by_layer, 0, "layer; 0 is the embedding", "relative distance"
    )


def _ways(budget: Budget, lost: Mapping[str, str], start: int, named: bool) -> str:
    """Lines of the task metric from the ``start``-th stage on, each named or not."""
    shared = [change.stage for change in stages_of(budget)][start:]
    own = [s for s in budget.stages if s.form]
    stages = [s for s in (*shared, *own) if s.task is not None]
    places = _places(stages)
    among = forms(budget)
    listed = named and len(among) > _NAMED

    def draw(figure: Figure, axes: Axes) -> None:
        ends = []
        for form in among:
            points = [
                (places[change.stage.stage], change.stage.task)
                for change in stages_of(budget, form)[start:]
                if change.stage.task is not None
                and (change.stage.form or change.stage is shared[-1])
            ]
            if len(points) < 2:
                continue
            look = _look(form)
            axes.plot(*zip(*points, strict=True), linewidth=1.8, markersize=6, **look)
            ends.append((*points[-1], form))
        line = [(places[s.stage], s.task) for s in shared if s.task is not None]
        axes.plot(*zip(*line, strict=True), "o-", color=INK, linewidth=2.2, markersize=7)
        values = [s.task for s in stages if s.task is not None]
        low, high = min(values), max(values)
        room = max(high - low, 2.0) * 0.2
        axes.set_ylim(low - room, high + room)
        for (x, y), after in zip(line, [*(y for _, y in line[1:]), low], strict=True):
            _note(axes, f"{y:.1f}", x, y, INK, below=after - y > room)
        _stage_axis(axes, places, right=0.3 if named else 0.5)
        axes.set_ylabel(f"{metric_name(budget)}, points")
        if listed:
            _forms_legend(figure, axes, among)
        elif named and ends:
            _name_ends(axes, ends, lost)

    rows = -(-len(among) // 2) if listed else 0
    return svg(draw, height=2.9 + 0.2 * rows, grid="y", empty=len(stages) < 2)


def _along(
    budget: Budget,
    pick: Callable[[BudgetStage], Sequence[float]],
    first: int,
    across: str,
    up: str,
) -> str:
    """A line a stage over the positions or layers, on a logarithmic axis."""
    found = [stage for stage in budget.stages if pick(stage)]

    def draw(figure: Figure, axes: Axes) -> None:
        axes.set_yscale("log")
        for stage in found:
            values = [max(value, _FLOOR) for value in pick(stage)]
            look = _look(stage.form)
            look["linestyle"] = _DASHES.get(stage.stage, "-")
            axes.plot(
                range(first, first + len(values)),
                values,
                **look,
                linewidth=1.5,
                markersize=4,
                markevery=max(1, len(values) // 6),
            )
            if not stage.form:
                end = (first + len(values) - 1, values[-1])
                axes.annotate(
                    stage.stage, end, (6, 0), textcoords="offset points", va="center", color=INK
                )
        for name in dict.fromkeys(s.stage for s in found if s.form):
            axes.plot([], [], _DASHES.get(name, "-"), color=MUTED, label=name)
        _forms_legend(figure, axes, list(dict.fromkeys(s.form for s in found if s.form)))
        _log_axis(axes, (max(value, _FLOOR) for stage in found for value in pick(stage)))
        axes.set_xlabel(across)
        axes.set_ylabel(up)

    entries = len({name for s in found if s.form for name in (s.form, s.stage)})
    return svg(draw, height=2.9 + 0.2 * -(-entries // 2), grid="both", empty=not found)


def _look(form: str) -> dict[str, Any]:
    """Colour by precision, marker by runtime, hollow for a bundle: never colour alone."""
    if not form:
        return {"color": INK, "marker": "o"}
    runtime, _, rest = form.partition("-")
    precision = rest.partition("-")[0]
    look = {
        "color": _PRECISIONS.get(precision, SERIES[3]),
        "marker": _MARKERS[runtime_index(runtime) % len(_MARKERS)],
    }
    return look | ({"markerfacecolor": "none"} if rest.endswith("bundle") else {})


def _places(stages: Sequence[BudgetStage]) -> dict[str, int]:
    """Where each stage stands across, in the order of the way."""
    there = {stage.stage for stage in stages}
    return {name: x for x, name in enumerate(name for name in STAGES if name in there)}


def _kl(stage: BudgetStage) -> float:
    return max(stage.previous.kl if stage.previous else 0.0, _FLOOR)


def _shown(kl: float) -> str:
    """A KL for people: 0.0041, 3·10⁻⁶, or 0 where it is drawn at the bottom."""
    if kl <= _FLOOR:
        return "0"
    digit, _, exponent = f"{kl:.0e}".partition("e")
    return f"{kl:.2g}" if kl >= 1e-3 else f"{digit}·{number(float('1e' + exponent))}"


def _log_axis(axes: Axes, values: Iterable[float]) -> None:
    """Powers of ten, the lowest of them for all that is less."""
    plain_log(axes)
    axes.minorticks_off()
    if min(values) <= _FLOOR:
        ticks = [1e-9, 1e-7, 1e-5, 1e-3, 0.1, 10]
        axes.set_yticks(ticks, ["0", *(number(tick) for tick in ticks[1:])])


def _stage_axis(axes: Axes, places: Mapping[str, int], right: float = 0.5) -> None:
    axes.set_xticks(list(places.values()), [_WRAPPED.get(name, name) for name in places])
    axes.set_xlim(-0.5, len(places) - 1 + right)
    axes.tick_params(axis="x", length=0, labelcolor=INK, labelsize=9)


def _note(axes: Axes, text: str, x: float, y: float, colour: str, below: bool = False) -> None:
    """Text above or below a point."""
    axes.annotate(
        text,
        (x, y),
        (0, -7 if below else 7),
        textcoords="offset points",
        ha="center",
        va="top" if below else "bottom",
        color=colour,
    )


def _name_ends(
    axes: Axes, ends: Sequence[tuple[float, float, str]], lost: Mapping[str, str]
) -> None:
    """Name each line at its end; names that would cover each other stand apart."""
    from scipy.optimize import isotonic_regression

    rows = sorted(ends, key=lambda end: end[1])
    low, high = axes.get_ylim()
    steps_up = [(high - low) / 13 * index for index in range(len(rows))]
    # As near to the lines as they can be with a step between each two.
    wanted = [y - up for (_, y, _), up in zip(rows, steps_up, strict=True)]
    heights = isotonic_regression(wanted).x + steps_up
    for height, (x, y, form) in zip(heights, rows, strict=True):
        wrong = form in lost
        axes.annotate(
            f"{'✕ ' if wrong else ''}{shown_form(form)} {y:.1f}",
            (x, y),
            (x + 0.35, height),
            textcoords="data",
            va="center",
            color=FAIL if wrong else INK,
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": LINE, "shrinkA": 1, "shrinkB": 4},
            annotation_clip=False,
        )


def _forms_legend(figure: Figure, axes: Axes, among: Sequence[str]) -> None:
    for form in among:
        axes.plot([], [], linestyle="", markersize=7, label=shown_form(form), **_look(form))
    legend(figure, columns=2)
