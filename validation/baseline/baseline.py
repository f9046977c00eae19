"""Baselines that later runs are compared with: accuracy, sizes and ratios of one run, to commit.

A baseline holds no time and no rate. Speed is the decode rate over that of the same run's fp32
artifact in the same runtime, and the share of the machine's memory bandwidth that decoding reaches:
both are taken within one run, so a machine that was slow that day is slow on both sides.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from math import isclose
from pathlib import Path
from statistics import fmean
from typing import Literal, Self

from pydantic import Field, model_validator

from caliport.core.errors import InputError
from caliport.core.places import write_text
from caliport.validation.evaluation.bootstrap import bootstrap_interval
from caliport.validation.latency.statistics import ratio
from caliport.validation.records.device import DeviceResult
from caliport.validation.records.latency import LatencyReport, LatencyResult, Spread
from caliport.validation.records.record import (
    Count,
    Machine,
    Name,
    Nats,
    Points,
    Positive,
    Record,
    Score,
    Share,
    Some,
    read_record,
)
from caliport.validation.records.reports import (
    LATENCY,
    PARITY,
    QUALITY,
    ArtifactResult,
    ParityReport,
    QualityReport,
    TaskResult,
    read_if_there,
    read_result,
)

MARK = "baseline: "
"""What the name of a gate against a baseline begins with."""
_CONFIDENCE = 0.95
_DIGITS = 6


class BaselineTask(Record):
    """The task metric: each example's score, 0 to 100, their mean and its bootstrap interval."""

    metric: Name
    mean: Points
    interval: tuple[Points, Points]
    scores: tuple[Score, ...]

    @model_validator(mode="after")
    def _of_its_scores(self) -> Self:
        if self.scores and not isclose(self.mean, fmean(self.scores), abs_tol=0.01):
            raise ValueError(f"mean is {self.mean:g}, that of its scores {fmean(self.scores):g}")
        return self


class Ratio(Record):
    """A ratio within one run, and an interval that holds it."""

    value: Positive
    interval: tuple[Positive, Positive]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.interval[0] <= self.value <= self.interval[1]:
            raise ValueError("the value is not within its interval")
        return self


class BaselineSpeed(Record):
    """How fast an artifact decodes, as ratios within its run.

    Attributes:
        threads, prompt_tokens, new_tokens: What was timed; other numbers give other ratios.
        relative: See ``over_fp32``.
        bandwidth_share: Bytes read a second over what the machine's memory gives, 0 to 1; None
            where it is not known or times are too noisy.
    """

    threads: Some
    prompt_tokens: Some
    new_tokens: Some
    relative: Ratio | None
    bandwidth_share: Ratio | None


class BaselineArtifact(Record):
    """One artifact.

    Attributes:
        prompts: Hash of the prompts; measures of other prompts cannot be compared.
        kl: Mean KL(fp32 || artifact), nats; ``quantization_kl`` and ``lowering_kl`` are its parts.
        top1: Share of positions where fp32 and artifact agree.
        bytes: On disk; ``parts`` as in the manifest.
        peak_bytes: Most resident memory while it ran.
        idle_bytes: The same process's before it was loaded: Python and the runtime. None in
            baselines that were stored without it.
    """

    method: Name
    prompts: Name | None
    kl: Nats
    quantization_kl: Nats
    lowering_kl: Nats
    top1: Share
    task: BaselineTask | None
    bytes: Count
    parts: dict[Name, Count]
    peak_bytes: Count | None
    idle_bytes: Count | None = None
    speed: BaselineSpeed | None


class BaselineComposition(Record):
    """The exported method in eager fp32: mean loss in nats a token over all scored examples."""

    method: Name
    loss: Nats | None
    examples: Count


class Baseline(Record):
    """A baseline: one run's figures, by the machine and the versions that they come from.

    ``compositions`` are by name, ``artifacts`` by ``name_of``. Where speed and memory are those of
    a device, ``device`` is that and ``device_versions`` are of its runtimes.
    """

    format: Literal[1] = 1
    machine: Machine
    device: Machine | None = None
    device_versions: dict[Name, Name] = Field(default_factory=dict)
    versions: dict[Name, Name]
    compositions: dict[Name, BaselineComposition]
    artifacts: dict[Name, BaselineArtifact]


def reports_of(run: Path) -> Path:
    """The reports directory of a run, or ``run`` itself where that is one.

    Raises:
        InputError: There is neither a ``parity.json`` nor a ``latency.json`` in either.
    """
    for place in (run / "reports", run):
        if (place / PARITY).is_file() or (place / LATENCY).is_file():
            return place
    raise InputError(
        f"{run}: no {PARITY}; expected a run directory or its reports, made by caliport validate"
    )


def baseline_of(reports: Path) -> Baseline:
    """The baseline that a run's reports give.

    Raises:
        InputError: A report is not valid, there is no artifact, or one failed a gate that is not
            itself against a baseline: a broken run is no baseline.
    """
    parity = read_result(ParityReport, reports / PARITY)
    if not parity.artifacts:
        raise InputError(f"{reports / PARITY}: no artifacts; expected at least one")
    latency = read_if_there(LatencyReport, reports / LATENCY)
    quality = read_if_there(QualityReport, reports / QUALITY)
    times = list(latency.artifacts) if latency else []
    timed = latency if latency and latency.device else None
    return Baseline(
        machine=parity.machine,
        device=timed.machine if timed else None,
        device_versions=timed.versions if timed else {},
        versions=dict(sorted(parity.versions.items())),
        compositions=compositions_of(quality),
        artifacts={
            name_of(artifact): _artifact(reports, artifact, times)
            for artifact in sorted(parity.artifacts, key=name_of)
        },
    )


def compositions_of(quality: QualityReport | None) -> dict[str, BaselineComposition]:
    """The exported method of each composition in ``quality.json``."""
    found = {}
    for name, result in sorted(quality.compositions.items()) if quality else ():
        best = next((m for m in result.methods if m.method == result.best), None)
        if best is not None:
            loss = None if best.loss is None else _rounded(best.loss)
            found[name] = BaselineComposition(
                method=best.method, loss=loss, examples=result.examples
            )
    return found


def name_of(result: ArtifactResult | DeviceResult | LatencyResult) -> str:
    """What tells an artifact from the others of a run, such as ``both: onnx int4 bundle``."""
    if isinstance(result, DeviceResult):
        return result.name
    return f"{result.composition}: {result.runtime} {result.form}"


def time_of(artifact: ArtifactResult, times: Sequence[LatencyResult]) -> LatencyResult | None:
    """The times of an artifact; None where it was not timed."""
    return next((time for time in times if name_of(time) == name_of(artifact)), None)


def over_fp32(found: LatencyResult, times: Sequence[LatencyResult]) -> Spread | None:
    """Decode rate over that of the fp32 artifact of the same composition and runtime.

    None for that artifact itself, where there is none, and where times are too noisy.
    """
    first = next((time for time in times if _is_fp32_of(time, found)), None)
    return None if first is None or first is found else ratio(found, first, "decode_rate")


def speed_of(found: LatencyResult, times: Sequence[LatencyResult]) -> BaselineSpeed:
    """Speed of one artifact as ratios within its run, ``times``."""
    share = found.bandwidth_share
    if share is not None and not found.noisy:
        # Bytes a token are counted and not measured, so the rate alone varies.
        reached = _ratio(found.decode_rate, share / found.decode_rate.median)
    else:
        reached = None
    return BaselineSpeed(
        threads=found.threads,
        prompt_tokens=found.prompt_tokens,
        new_tokens=found.new_tokens,
        relative=_ratio(over_fp32(found, times), 1.0),
        bandwidth_share=reached,
    )


def write_baseline(baseline: Baseline, place: Path) -> Path:
    """Write a baseline, keys in order and an example's scores on one line, and return its path.

    Args:
        baseline: What to write.
        place: A ``.json`` file, or a directory in which the file is named after the machine.

    Raises:
        InputError: The path cannot be written.
    """
    path = (
        place if place.suffix == ".json" else place / file_name(baseline.device or baseline.machine)
    )
    text = baseline.model_dump_json(indent=1)
    write_text(path, re.sub(r"\[[-\d.,e\s]+\]", _one_line, text) + "\n")
    return path


def read_baseline(place: Path, machine: Machine) -> tuple[Path, Baseline]:
    """Read a baseline file; of a directory the file of ``machine``, else the first by name.

    Returns:
        The file's path and what it holds.

    Raises:
        InputError: No such file, no baseline in the directory, or one that is not valid.
    """
    path = place
    if place.is_dir():
        files = sorted(place.glob("*.json"))
        if not files:
            raise InputError(f"{place}: no baseline in it; caliport baseline store writes one")
        own = place / file_name(machine)
        path = own if own in files else files[0]
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such baseline; caliport baseline store writes one")
    return path, read_record(Baseline, path, "caliport baseline store")


def file_name(machine: Machine) -> str:
    """A file's name for a machine, such as ``amd-epyc-2-cores-linux-x86_64.json``."""
    words = f"{machine.cpu} {machine.cores} cores {machine.os}".lower()
    return re.sub(r"[^a-z0-9_]+", "-", words).strip("-") + ".json"


def _artifact(
    reports: Path, artifact: ArtifactResult, times: Sequence[LatencyResult]
) -> BaselineArtifact:
    broken = [g for g in artifact.gates if not g.passed and not g.name.startswith(MARK)]
    if broken or artifact.total is None or artifact.lowering is None:
        reason = broken[0].name if broken else "no measures"
        raise InputError(
            f"{reports / PARITY}: {name_of(artifact)} failed ({reason}); expected a run that "
            "passes all gates but those against an earlier baseline"
        )
    time = time_of(artifact, times)
    return BaselineArtifact(
        method=artifact.method,
        prompts=artifact.asked.prompts if artifact.asked else None,
        kl=_rounded(artifact.total.kl),
        quantization_kl=_rounded(artifact.quantization.kl),
        lowering_kl=_rounded(artifact.lowering.kl),
        top1=_rounded(artifact.total.top1),
        task=_task(artifact.task) if artifact.task else None,
        bytes=artifact.bytes,
        parts=artifact.parts,
        peak_bytes=time.peak_bytes if time else None,
        idle_bytes=time.idle_bytes if time else None,
        speed=speed_of(time, times) if time else None,
    )


def _task(task: TaskResult) -> BaselineTask:
    import numpy as np

    scores = tuple(round(score, 2) for score in task.artifact_scores)
    low = high = task.artifact
    if scores:
        low, high = bootstrap_interval(np.asarray(task.artifact_scores), _CONFIDENCE)
    return BaselineTask(
        metric=task.metric,
        mean=_rounded(task.artifact),
        interval=(_rounded(low), _rounded(high)),
        scores=scores,
    )


def _ratio(spread: Spread | None, scale: float) -> Ratio | None:
    if spread is None:
        return None
    low, high = spread.interval
    return Ratio(
        value=_rounded(spread.median * scale),
        interval=(_rounded(low * scale), _rounded(high * scale)),
    )


def _is_fp32_of(candidate: LatencyResult, found: LatencyResult) -> bool:
    same = (candidate.composition, candidate.runtime) == (found.composition, found.runtime)
    return same and candidate.form == "fp32"


def _rounded(value: float) -> float:
    """Six digits: more would change with every run and say nothing."""
    return float(f"{value:.{_DIGITS}g}")


def _one_line(found: re.Match[str]) -> str:
    return " ".join(found[0].split()).replace("[ ", "[").replace(" ]", "]")
