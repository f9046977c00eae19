"""Two runs side by side: what differs, and whether it is more than noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from caliport.core.places import write_text
from caliport.validation.baseline.baseline import name_of, over_fp32, reports_of
from caliport.validation.evaluation.bootstrap import bootstrap_interval
from caliport.validation.records.budget import Budget
from caliport.validation.records.device import DeviceResult, DeviceUsed
from caliport.validation.records.gate import Gate
from caliport.validation.records.latency import LatencyReport, LatencyResult
from caliport.validation.records.record import Machine
from caliport.validation.records.reports import (
    LATENCY,
    PARITY,
    QUALITY,
    ArtifactResult,
    ParityReport,
    QualityReport,
    read_if_there,
    read_result,
)
from caliport.validation.report.budget_summary import changes, metric_name, shown_form
from caliport.validation.report.compare_figures import (
    TONES,
    Figure,
    change_figure,
    scientific,
    shown_both,
    timed_figure,
)
from caliport.validation.report.headline import Headline, headline, page_environment, seconds
from caliport.validation.report.names import METRIC_NAMES, size

PAGE = "compare.html"
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Pair:
    """An artifact, or a method of a composition, in both runs.

    Attributes:
        name: Its name in both.
        verdicts: pass, unsure, fail or missing in each run; empty for a method.
        gates: Those whose verdict is not the same: name, verdict before and after, and the reason.
        figures: All of them, changed or not.
    """

    name: str
    verdicts: tuple[str, str]
    gates: tuple[tuple[str, str, str, str], ...]
    figures: tuple[Figure, ...]

    @property
    def changed(self) -> tuple[Figure, ...]:
        """The figures that are not the same."""
        return tuple(figure for figure in self.figures if figure.tone != "same")


@dataclass(frozen=True)
class StagePair:
    """A stage of a composition's error budget in both runs; a dash where one does not have it.

    Attributes:
        stage, form: Its name, and the artifact that it belongs to; no form where all share it.
        kl: KL in nats against the stage before.
        task: Task metric, 0 to 100.
    """

    stage: str
    form: str
    kl: tuple[str, str]
    task: tuple[str, str]


@dataclass(frozen=True)
class Comparison:
    """Two runs.

    Attributes:
        names: Of the runs.
        headlines: The verdict of each.
        differences: Machine and versions where they differ: what, before, after.
        artifacts: By name, in the order of the second run, then those that only the first has.
        budgets: The stages of each composition that has an error budget in either run.
        methods: Of each composition in ``quality.json``, likewise.
        warnings: What makes figures not comparable.
    """

    names: tuple[str, str]
    headlines: tuple[Headline, Headline]
    differences: tuple[tuple[str, str, str], ...]
    artifacts: tuple[Pair, ...]
    budgets: dict[str, tuple[StagePair, ...]]
    methods: tuple[Pair, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Run:
    parity: ParityReport
    latency: LatencyReport | None
    quality: QualityReport | None

    @property
    def times(self) -> list[LatencyResult]:
        return self.latency.artifacts if self.latency else []

    @property
    def device(self) -> DeviceUsed | None:
        """That was timed, where it was one."""
        return self.latency.device.device if self.latency and self.latency.device else None

    @property
    def timed_on(self) -> Machine:
        return self.latency.machine if self.latency and self.device else self.parity.machine


def compare_runs(first: Path, second: Path) -> Comparison:
    """Compare two runs, or their reports directories.

    Raises:
        InputError: One has no ``parity.json`` or ``latency.json``, or one that is not valid.
    """
    before, after = _read(first), _read(second)
    machines = before.timed_on, after.timed_on
    differences = tuple(_differences(before.parity, after.parity))
    warnings = []
    if any(_place(machine) != _place(machines[0]) for machine in machines):
        warnings.append(
            "The machines are not the same: times and memory say nothing about the code."
        )
    for run in (before, after):
        if run.device is not None and run.device.label:
            warnings.append(f"{run.device.shown}: they are left out.")
    asked = [
        {artifact.asked.prompts for artifact in run.parity.artifacts if artifact.asked}
        for run in (before, after)
    ]
    if asked[0] != asked[1]:
        warnings.append("The prompts are not the same: KL and agreement are of other texts.")
    return Comparison(
        names=_names(first, second),
        headlines=(_headline(before.parity), _headline(after.parity)),
        differences=differences,
        artifacts=(*_artifacts(before, after), *_devices(before, after)),
        budgets=_budgets(before.parity.budgets, after.parity.budgets),
        methods=tuple(_methods(before.quality, after.quality)),
        warnings=tuple(warnings),
    )


def write_page(comparison: Comparison, path: Path) -> None:
    """Write a comparison as one self-contained HTML page.

    Raises:
        InputError: The path cannot be written.
    """
    template = page_environment().get_template("compare.html.j2")
    write_text(path, template.render(c=comparison, tones=TONES))


def _read(run: Path) -> _Run:
    reports = reports_of(run)
    latency = read_if_there(LatencyReport, reports / LATENCY)
    if latency is not None and not (reports / PARITY).exists():
        parity = ParityReport(machine=latency.machine, versions=latency.versions, artifacts=[])
    else:
        parity = read_result(ParityReport, reports / PARITY)
    return _Run(parity, latency, read_if_there(QualityReport, reports / QUALITY))


def _headline(report: ParityReport) -> Headline:
    return headline(report.artifacts, devices=report.devices)


def _names(first: Path, second: Path) -> tuple[str, str]:
    names = first.resolve().name, second.resolve().name
    return names if names[0] != names[1] else (str(first), str(second))


def _place(machine: Machine) -> tuple[str, int, str]:
    return machine.cpu, machine.cores, machine.os


def _differences(before: ParityReport, after: ParityReport) -> Iterator[tuple[str, str, str]]:
    was, now = before.machine.model_dump(), after.machine.model_dump()
    for field, label in (
        ("cpu", "processor"),
        ("cores", "cores"),
        ("memory_gb", "memory, GB"),
        ("os", "system"),
    ):
        if was[field] != now[field]:
            yield label, str(was[field]), str(now[field])
    for package in sorted(before.versions.keys() | after.versions.keys()):
        old, new = before.versions.get(package, "–"), after.versions.get(package, "–")
        if old != new:
            yield package, old, new


def _artifacts(before: _Run, after: _Run) -> Iterator[Pair]:
    was = {name_of(artifact): artifact for artifact in before.parity.artifacts}
    now = {name_of(artifact): artifact for artifact in after.parity.artifacts}
    for name in dict.fromkeys((*now, *was)):
        old, new = was.get(name), now.get(name)
        figures = [*_accuracy(old, new), *_times(name, before, after)]
        yield Pair(name, (_verdict(old), _verdict(new)), tuple(_gates(old, new)), tuple(figures))
    timed = [name_of(time) for run in (after, before) for time in run.times]
    for name in dict.fromkeys(timed):
        if name not in was and name not in now:
            yield Pair(name, ("", ""), (), tuple(_times(name, before, after)))


def _devices(before: _Run, after: _Run) -> Iterator[Pair]:
    """Artifacts on devices, by model, against themselves on the host."""
    was, now = (
        {
            f"{r.composition}: {r.runtime} {r.form} on {r.device.model}": r
            for r in run.parity.devices
        }
        for run in (before, after)
    )
    for name in dict.fromkeys((*now, *was)):
        old, new = was.get(name), now.get(name)
        kl = [result.measures.kl if result and result.measures else None for result in (old, new)]
        same = [result.identical / result.examples if result else None for result in (old, new)]
        figures = (
            change_figure("KL from the host, nats", kl, scientific),
            change_figure("answers as on the host", same, "{:.1%}".format, more_is_better=True),
        )
        yield Pair(name, (_verdict(old), _verdict(new)), tuple(_gates(old, new)), figures)


def _verdict(artifact: ArtifactResult | DeviceResult | None) -> str:
    if artifact is None:
        return "missing"
    if not artifact.passed:
        return "fail"
    return "pass" if all(gate.decided for gate in artifact.gates) else "unsure"


def _gates(
    old: ArtifactResult | DeviceResult | None, new: ArtifactResult | DeviceResult | None
) -> Iterator[tuple[str, str, str, str]]:
    """Gates whose verdict differs, but for those that pass in one run and are not in the other."""
    if old is None or new is None:
        return
    was, now = ({gate.name: gate for gate in artifact.gates} for artifact in (old, new))
    for name in dict.fromkeys((*now, *was)):
        found = now.get(name) or was[name]
        words = _said(was.get(name)), _said(now.get(name))
        if words[0] != words[1] and {*words} != {"pass", "not checked"}:
            yield name, *words, found.reason


def _said(gate: Gate | None) -> str:
    if gate is None:
        return "not checked"
    if not gate.passed:
        return "fail"
    return "pass" if gate.decided else "undecided"


def _accuracy(old: ArtifactResult | None, new: ArtifactResult | None) -> Iterator[Figure]:
    yield _task(old, new)
    yield _exact(
        "KL from fp32, nats", old, new, lambda a: a.total.kl if a.total else None, scientific
    )
    yield _exact(
        "top-1 agreement with fp32",
        old,
        new,
        lambda a: a.total.top1 if a.total else None,
        lambda value: f"{value:.2%}",
        more_is_better=True,
    )
    yield _exact("size", old, new, lambda a: a.bytes, size, relative=True)
    parts = dict.fromkeys([*(old.parts if old else ()), *(new.parts if new else ())])
    for part in parts:
        sizes = [None if a is None else a.parts.get(part, 0) for a in (old, new)]
        figure = change_figure(f"size of {part}", sizes, size, relative=True)
        if figure.tone != "same":
            yield figure


def _exact(
    label: str,
    old: ArtifactResult | None,
    new: ArtifactResult | None,
    pick: Callable[[ArtifactResult], float | None],
    show: Callable[[float], str],
    *,
    more_is_better: bool = False,
    relative: bool = False,
) -> Figure:
    """A figure without noise: the same artifact gives the same on the same prompts."""
    values = [None if a is None else pick(a) for a in (old, new)]
    return change_figure(label, values, show, more_is_better=more_is_better, relative=relative)


def _task(old: ArtifactResult | None, new: ArtifactResult | None) -> Figure:
    was, now = (a.task if a else None for a in (old, new))
    named = now or was
    metric = METRIC_NAMES.get(named.metric, named.metric) if named else "task metric"
    shown = shown_both((was, now), lambda task: f"{task.artifact:.2f}")
    if old is None or new is None or was is None or now is None or was.metric != now.metric:
        return Figure(metric, *shown)
    scores = [np.asarray(task.artifact_scores) for task in (was, now)]
    difference = now.artifact - was.artifact
    if difference == 0 or not all(map(len, scores)):
        return Figure(metric, *shown, change=f"{difference:+.2f}" if difference else "")
    same = old.asked is not None and new.asked is not None and old.asked == new.asked
    if same and len(scores[0]) == len(scores[1]):
        low, high = bootstrap_interval(scores[1] - scores[0], _CONFIDENCE)
    else:
        ends = [bootstrap_interval(values, _CONFIDENCE) for values in scores]
        half = math.hypot(*((high - low) / 2 for low, high in ends))
        low, high = difference - half, difference + half
    tone = "better" if low > 0 else "worse" if high < 0 else "noise"
    change = f"{difference:+.2f} ({low:+.2f} to {high:+.2f})"
    return Figure(metric, *shown, change=change, tone=tone)


def _times(name: str, before: _Run, after: _Run) -> Iterator[Figure]:
    runs = (before, after)
    both = [next((t for t in run.times if name_of(t) == name), None) for run in runs]
    if both == [None, None]:
        return
    # Times of an emulator, or of what stands in for a device, are no results.
    timed = [
        None if run.device and run.device.label else time
        for run, time in zip(runs, both, strict=True)
    ]
    loads = [time.load_seconds if time else None for time in timed]
    firsts = [time.first_token_seconds if time else None for time in timed]
    rates = [time.decode_rate if time else None for time in timed]
    ratios = [over_fp32(t, run.times) if t else None for t, run in zip(both, runs, strict=True)]
    yield timed_figure("load", both, loads, seconds)
    yield timed_figure("first token", both, firsts, seconds)
    yield timed_figure("decode, tokens/s", both, rates, "{:.0f}".format, more_is_better=True)
    if any(ratios):
        yield timed_figure("decode over fp32's", both, ratios, "{:.2f}".format, more_is_better=True)
    peaks = [time.peak_bytes if time else None for time in both]
    yield change_figure("peak memory", peaks, size, relative=True)


def _budgets(before: Sequence[Budget], after: Sequence[Budget]) -> dict[str, tuple[StagePair, ...]]:
    """Stages by composition and metric, in the order of the second run."""
    was, now = (
        {
            f"{budget.composition}, {metric_name(budget)}": {
                (change.stage.form, change.stage.stage): change.stage for change in changes(budget)
            }
            for budget in budgets
        }
        for budgets in (before, after)
    )
    found = {}
    for name in dict.fromkeys((*now, *was)):
        both = was.get(name, {}), now.get(name, {})
        rows = []
        for form, stage in dict.fromkeys((*both[1], *both[0])):
            pair = [stages.get((form, stage)) for stages in both]
            kl = shown_both([s.previous.kl if s and s.previous else None for s in pair], scientific)
            task = shown_both([s.task if s else None for s in pair], "{:.2f}".format)
            rows.append(StagePair(stage, shown_form(form), kl, task))
        found[name] = tuple(rows)
    return found


def _methods(before: QualityReport | None, after: QualityReport | None) -> Iterator[Pair]:
    """Methods by composition, where either run has scored any."""
    was, now = (
        {
            f"{name}: {method.label}": method
            for name, result in (report.compositions.items() if report else ())
            for method in result.methods
        }
        for report in (before, after)
    )
    for name in dict.fromkeys((*now, *was)):
        old, new = was.get(name), now.get(name)
        figures = []
        for label, field, form, more_is_better in (
            ("loss, nats", "loss", "{:.4f}", False),
            ("ROUGE-L", "rougeL", "{:.2f}", True),
            ("chrF", "chrf", "{:.2f}", True),
        ):
            values = [None if m is None else getattr(m, field) for m in (old, new)]
            figures.append(change_figure(label, values, form.format, more_is_better=more_is_better))
        yield Pair(name, ("", ""), (), tuple(figures))
