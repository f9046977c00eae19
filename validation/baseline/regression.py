"""Gates against a baseline: is this run worse than the agreed one?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from packaging.version import InvalidVersion, Version
from pydantic import Field

from caliport.validation.baseline.baseline import (
    MARK,
    Baseline,
    BaselineArtifact,
    BaselineComposition,
    BaselineSpeed,
    BaselineTask,
    Ratio,
    compositions_of,
    name_of,
    read_baseline,
    speed_of,
    time_of,
)
from caliport.validation.gates import limits as gates
from caliport.validation.records.gate import Gate
from caliport.validation.records.latency import LatencyReport, LatencyResult
from caliport.validation.records.record import Machine, Record
from caliport.validation.records.reports import (
    ArtifactResult,
    BaselineUse,
    ParityReport,
    QualityReport,
    TaskResult,
)

_STAGES = ("calibration", "quantization", "lowering", "size", "memory", "speed")
_SAME_KL = 1e-6  # nats; float32 sums in another order, as the lowering gate of fp32 allows


class RegressionLimits(Record):
    """How much worse than the baseline an artifact may be.

    Attributes:
        margin: Points (0 to 100) of the task metric. Retraining with another seed moves a mean over
            some dozens of examples by about as much.
        loss: Nats a token of the exported method in eager fp32; 0.02 is 2 % of perplexity.
        kl: Share by which KL from fp32 may grow. Two trainings of the toy differ by up to a sixth,
            the two runtimes by up to a tenth; a layer that lost a bit multiplies it.
        top1: Share of positions that may newly disagree with fp32. One is always allowed.
        size: Share by which the bytes may grow. A tokenizer's or a graph's own changes are far
            less, a layer kept at 8 bits instead of 4 is more.
        memory: Share by which peak memory may grow. Allocators round up and differ between runs.
            Where both say it, that of the process before the artifact was loaded (Python and the
            runtime) is taken off.
        speed: Share of the ratios that may be lost, beyond what both runs' noise explains.
        confidence: Of the bootstrap interval of the task metric.
    """

    margin: float = Field(1.0, ge=0)
    loss: float = Field(0.02, ge=0)
    kl: float = Field(0.25, ge=0)
    top1: float = Field(0.01, ge=0)
    size: float = Field(0.02, ge=0)
    memory: float = Field(0.10, ge=0)
    speed: float = Field(0.10, ge=0, lt=1)
    confidence: float = Field(0.95, gt=0, lt=1)


def with_baseline_gates(
    report: ParityReport,
    place: Path | None,
    limits: RegressionLimits,
    latency: LatencyReport | None = None,
    quality: QualityReport | None = None,
) -> ParityReport:
    """The report with gates against the baseline stored at ``place``; unchanged where that is None.

    The other arguments are those of ``hold_to``.

    Raises:
        InputError: The baseline cannot be read.
    """
    if place is None:
        return report
    file, baseline = read_baseline(place, report.machine)
    return hold_to(report, latency.artifacts if latency else [], quality, file, baseline, limits)


def hold_to(
    report: ParityReport,
    times: Sequence[LatencyResult],
    quality: QualityReport | None,
    file: Path,
    baseline: Baseline,
    limits: RegressionLimits,
) -> ParityReport:
    """The report with gates against a baseline added to each artifact that the baseline has.

    Speed and memory are gated only where machine, versions and what was timed are the baseline's;
    ``ParityReport.baseline`` says what was left out and why.

    Args:
        report: Without such gates.
        times: Latency of the same artifacts, as far as they were timed.
        quality: Of the same run; None leaves out the gate on the exported method.
        file: Where the baseline was read from.
        baseline: What it holds.
        limits: Of the recipe.
    """
    notes = differences(baseline.machine, baseline.versions, report.machine, report.versions)
    if baseline.device is not None:
        notes.append(f"timed on a device: {baseline.device.cpu}, {baseline.device.os}")
    same_place = not notes
    if notes:
        notes.append("speed and memory are not held to it; accuracy and size are")
    names = {name_of(artifact) for artifact in report.artifacts}
    notes += [f"{name}: not in the baseline" for name in sorted(names - baseline.artifacts.keys())]
    notes += [
        f"{name}: in the baseline, not in this run"
        for name in sorted(baseline.artifacts.keys() - names)
    ]
    composed = compositions_of(quality)
    artifacts = []
    for artifact in report.artifacts:
        before = baseline.artifacts.get(name_of(artifact))
        if before is None:
            artifacts.append(artifact)
            continue
        pair = baseline.compositions.get(artifact.composition), composed.get(artifact.composition)
        added = [*_composition(*pair, limits), *_accuracy(before, artifact, limits)]
        added.append(_size(before, artifact, limits))
        time = time_of(artifact, times)
        if same_place and time is not None:
            added += _memory(before, time, limits)
            if before.speed is not None:
                speed, left_out = _speed(before.speed, speed_of(time, times), limits)
                added += speed
                notes += [f"{name_of(artifact)}: {note}" for note in left_out]
        artifacts.append(_with(artifact, added))
    used = BaselineUse(
        file=str(file), machine=baseline.machine, versions=baseline.versions, notes=tuple(notes)
    )
    return report.model_copy(update={"artifacts": artifacts, "baseline": used})


def hold_times(
    report: LatencyReport, baseline: Baseline
) -> tuple[dict[str, list[Gate]], list[str]]:
    """Gates on memory and speed on a device, by ``name_of``, and notes on what was left out.

    Args:
        report: Of a device.
        baseline: Of the same device and versions; there are no gates against another one.
    """
    limits = RegressionLimits()
    if baseline.device is None:
        return {}, ["not timed on a device"]
    notes = differences(baseline.device, baseline.device_versions, report.machine, report.versions)
    if notes:
        return {}, notes
    found = {}
    for time in report.artifacts:
        before = baseline.artifacts.get(name_of(time))
        if before is None:
            notes.append(f"{name_of(time)}: not in the baseline")
            continue
        found[name_of(time)] = _memory(before, time, limits)
        if before.speed is not None:
            speed, left_out = _speed(before.speed, speed_of(time, report.artifacts), limits)
            found[name_of(time)] += speed
            notes += [f"{name_of(time)}: {note}" for note in left_out]
    return found, notes


def differences(
    before: Machine,
    before_versions: Mapping[str, str],
    machine: Machine,
    versions: Mapping[str, str],
) -> list[str]:
    """What makes a baseline one for another device or other major versions, one line each.

    Memory may differ: a virtual machine's varies by what its host keeps. Caliport's own version
    does not count, since a change of it is what a baseline is there to judge.
    """
    found = []
    for field, name in (("cpu", "processor"), ("cores", "number of cores"), ("os", "system")):
        was, now = getattr(before, field), getattr(machine, field)
        if was != now:
            found.append(f"made with another {name}: {was}, here {now}")
    for package in sorted((before_versions.keys() | versions.keys()) - {"caliport"}):
        was, now = before_versions.get(package), versions.get(package)
        if _series(package, was) != _series(package, now):
            found.append(f"made with {package} {was or 'missing'}, here {now or 'missing'}")
    return found


def _series(package: str, version: str | None) -> tuple[int, ...]:
    """What must agree: the major version; below 1, and of Python, the minor one too."""
    try:
        release = Version(version or "").release
    except InvalidVersion:
        return ()
    return release[:1] if release[0] and package != "python" else release[:2]


def _with(artifact: ArtifactResult, added: Sequence[Gate]) -> ArtifactResult:
    verdicts = [*artifact.gates, *added]
    failed = {gate.stage for gate in added if not gate.passed}
    worse = next((stage for stage in _STAGES if stage in failed), None)
    return artifact.model_copy(
        update={
            "gates": verdicts,
            "passed": artifact.passed and not failed,
            "lost_at": gates.lost_at(artifact.gates) or worse,
        }
    )


def _composition(
    before: BaselineComposition | None, now: BaselineComposition | None, limits: RegressionLimits
) -> list[Gate]:
    """The exported method's own loss: what was lost there is lost in every artifact."""
    if before is None or now is None or before.loss is None or now.loss is None:
        return []
    switch = "" if before.method == now.method else f", {now.method} in place of {before.method}"
    return [
        _gate(
            "exported method",
            "growth of the loss, nats a token",
            limits.loss,
            now.loss - before.loss,
            stage="calibration",
            reason=f"loss {before.loss:.4f} before, {now.loss:.4f} now{switch}; it may grow by "
            f"{limits.loss:g}",
        )
    ]


def _accuracy(
    before: BaselineArtifact, artifact: ArtifactResult, limits: RegressionLimits
) -> list[Gate]:
    now, lowering = artifact.total, artifact.lowering
    if now is None or lowering is None:  # not finite, which is a failed gate already
        return []
    asked = artifact.asked.prompts if artifact.asked else None
    same_prompts = before.prompts is not None and before.prompts == asked
    added = []
    was, is_now = before.task, artifact.task
    if was is not None and is_now is not None and was.metric == is_now.metric and was.scores:
        added.append(_task(was, is_now, same_prompts, limits))
    grown = {
        "quantization": artifact.quantization.kl - before.quantization_kl,
        "lowering": lowering.kl - before.lowering_kl,
    }
    stage = max(grown, key=lambda name: grown[name])
    allowed = before.kl * (1 + limits.kl) + _SAME_KL
    flips = round((before.top1 - now.top1) * now.positions)
    may_flip = max(1, math.floor(limits.top1 * now.positions))
    measured = [
        _gate(
            "distribution",
            "KL from fp32, nats",
            allowed,
            now.kl,
            stage=stage,
            reason=f"KL from fp32 {before.kl:.3g} before, {now.kl:.3g} now; it may grow by "
            f"{limits.kl:.0%}",
        ),
        _gate(
            "favourite tokens",
            "positions that newly differ from fp32",
            may_flip,
            flips,
            stage=stage,
            reason=f"agreement with fp32 {before.top1:.2%} before, {now.top1:.2%} now: {flips:+d} "
            f"of {now.positions} positions differ, {may_flip} may: near ties fall either way",
        ),
    ]
    return [*added, *(gate if same_prompts else _undecided(gate) for gate in measured)]


def _undecided(gate: Gate) -> Gate:
    return gate.model_copy(
        update={
            "passed": True,
            "decided": False,
            "reason": "the baseline was made with other prompts, so this cannot be compared; "
            "store it anew",
        }
    )


def _task(before: BaselineTask, now: TaskResult, paired: bool, limits: RegressionLimits) -> Gate:
    """Non-inferiority to the baseline by bootstrap, paired where the examples are the same."""
    old, new = np.asarray(before.scores), np.asarray(now.artifact_scores)
    mean = float(new.mean() - old.mean())
    if paired and len(old) == len(new):
        low, high = gates.bootstrap_interval(new - old, limits.confidence)
        kind = "paired"
    else:
        widths = [_half(old, limits.confidence), _half(new, limits.confidence)]
        low, high = mean - math.hypot(*widths), mean + math.hypot(*widths)
        kind = "other examples"
    shown, lost = low >= -limits.margin, high < -limits.margin
    reason = (
        f"{now.metric} {before.mean:.2f} before, {now.artifact:.2f} now, {limits.confidence:.0%} "
        f"interval of the change {low:+.2f} to {high:+.2f} ({kind}); {limits.margin:g} points may "
        "be lost"
    )
    if not shown and not lost:
        reason += f"; {len(new)} examples are too few to say"
    fp32_lost = (before.mean - now.fp32) > (before.mean - now.artifact) / 2
    return Gate(
        name=f"{MARK}task quality",
        measure=f"{now.metric} difference from the baseline, points",
        limit=-limits.margin,
        found=mean,
        passed=not lost,
        decided=shown or lost,
        stage="calibration" if fp32_lost else "quantization",
        reason=reason,
    )


def _half(scores: np.ndarray, confidence: float) -> float:
    low, high = gates.bootstrap_interval(scores, confidence)
    return (high - low) / 2


def _size(before: BaselineArtifact, artifact: ArtifactResult, limits: RegressionLimits) -> Gate:
    grown = {name: artifact.parts.get(name, 0) - size for name, size in before.parts.items()}
    grown |= {n: size for n, size in artifact.parts.items() if n not in before.parts}
    most = max(grown, key=lambda name: grown[name], default=None)
    where = f", most in {most} ({grown[most]:+,})" if most and grown[most] > 0 else ""
    return _gate(
        "size",
        "bytes",
        math.floor(before.bytes * (1 + limits.size)),
        artifact.bytes,
        stage="size",
        reason=f"{before.bytes:,} bytes before, {artifact.bytes:,} now{where}; it may grow by "
        f"{limits.size:.0%}",
    )


def _memory(before: BaselineArtifact, now: LatencyResult, limits: RegressionLimits) -> list[Gate]:
    if before.peak_bytes is None or now.peak_bytes is None:
        return []
    was, found, what = before.peak_bytes, now.peak_bytes, ""
    if before.idle_bytes is not None and now.idle_bytes is not None:
        was, found = was - before.idle_bytes, found - now.idle_bytes
        what = " over the process before loading"
    return [
        _gate(
            "peak memory",
            f"bytes{what}",
            math.floor(was * (1 + limits.memory)),
            found,
            stage="memory",
            reason=f"{was / 1e6:.1f} MB before, {found / 1e6:.1f} MB now{what}; it may grow by "
            f"{limits.memory:.0%}",
        )
    ]


def _speed(
    before: BaselineSpeed, now: BaselineSpeed, limits: RegressionLimits
) -> tuple[list[Gate], list[str]]:
    """Gates on the ratios that both runs have, and what stands in the way of the others."""
    timed = [(s.threads, s.prompt_tokens, s.new_tokens) for s in (before, now)]
    if timed[0] != timed[1]:
        was, here = (f"{t} threads, {p} prompt and {n} new tokens" for t, p, n in timed)
        return [], [f"speed is not held to it: timed with {was}, here with {here}"]
    pairs = {
        "speed over fp32": (before.relative, now.relative),
        "share of memory bandwidth": (before.bandwidth_share, now.bandwidth_share),
    }
    known = {name: (was, is_now) for name, (was, is_now) in pairs.items() if was and is_now}
    missing = [name for name, (was, is_now) in pairs.items() if was and not is_now]
    return (
        [_ratio(name, was, is_now, limits) for name, (was, is_now) in known.items()],
        [f"{name} is not held to it: not known here, or too noisy" for name in missing],
    )


def _ratio(name: str, before: Ratio, now: Ratio, limits: RegressionLimits) -> Gate:
    """Fails where the loss is beyond limit and joint noise; undecided where noise hides it."""
    change = now.value / before.value - 1
    widths = [(r.interval[1] - r.interval[0]) / 2 / r.value for r in (before, now)]
    noise = math.hypot(*widths)
    shown, lost = change - noise >= -limits.speed, change + noise < -limits.speed
    reason = (
        f"{before.value:.3g} before, {now.value:.3g} now: {change:+.1%}, joint noise {noise:.1%}; "
        f"{limits.speed:.0%} may be lost"
    )
    if not shown and not lost:
        reason += "; the times vary too much to say"
    return Gate(
        name=MARK + name,
        measure="change, as a share",
        limit=-limits.speed,
        found=change,
        passed=not lost,
        decided=shown or lost,
        stage="speed",
        reason=reason,
    )


def _gate(name: str, measure: str, limit: float, found: float, *, stage: str, reason: str) -> Gate:
    """A gate that passes where what was found is at most the limit."""
    return Gate(
        name=MARK + name,
        measure=measure,
        limit=limit,
        found=found,
        passed=found <= limit,
        stage=stage,
        reason=reason,
    )
