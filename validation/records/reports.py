"""The JSON files of a run's reports, their schema, and reading them back."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import Field, model_validator

from caliport.core.directories import versions
from caliport.core.errors import InputError, printable
from caliport.core.machine import _cpu_name
from caliport.core.places import check_file, write_text
from caliport.export.artifact import Artifact
from caliport.validation.records.agreement import agreeing, result_trouble, task_trouble
from caliport.validation.records.audit import AuditReport
from caliport.validation.records.budget import Budget
from caliport.validation.records.device import DeviceResult
from caliport.validation.records.gate import AdapterEffect, Gate, Measures, StockResult
from caliport.validation.records.latency import LatencyReport
from caliport.validation.records.record import (
    Amount,
    Count,
    Difference,
    Machine,
    Name,
    Nats,
    Points,
    Record,
    Score,
    Seed,
    Share,
    Some,
    Text,
    read_record,
    shown_form,
)

QUALITY, PARITY, LATENCY = "quality.json", "parity.json", "latency.json"
AUDIT = "audit.json"
REPORT, JUNIT, SUMMARY = "report.html", "junit.xml", "summary.md"


class Point(Record):
    """A point of a training curve: mean loss in nats up to a step."""

    step: Count
    loss: float


class QuantizedScore(Record):
    """A method's score with quantized weights in place of fp32 ones."""

    loss: Nats
    rougeL: Points
    chrf: Points


class MethodResult(Record):
    """One way to do a composition.

    Attributes:
        method: Its key, such as ``lc``; ``label`` is for people.
        loss: Of the references in nats a token, None where no single model wrote the outputs.
        rougeL, chrf, weighted_rouge: 0 to 100.
        judge: Percentage of answers that a judge called right; None without a judge.
        parameters, bytes: What must be stored beyond the base and the single-task adapters.
        passes: Inference passes an answer takes.
        seconds: To train or merge it.
        quantized: Scores by weights: ``int4`` folded, ``int4-bundle`` beside a quantized base.
    """

    method: Name
    label: Name
    loss: Nats | None
    rougeL: Points
    chrf: Points
    weighted_rouge: Points | None = None
    judge: Points | None = None
    parameters: Count
    bytes: Count
    passes: Count
    seconds: Amount
    quantized: dict[Name, QuantizedScore] = Field(default_factory=dict)


class QualitySample(Record):
    """One example: what was asked, what is right, and what each method wrote."""

    input: str
    reference: str
    outputs: dict[Name, str]


class CompositionResult(Record):
    """All methods on one composition.

    Attributes:
        best: The one that is exported.
        chosen_on: On how many other examples it was chosen; 0 where none were kept back for it.
    """

    tasks: list[Name]
    split: Name
    examples: Count
    methods: list[MethodResult]
    best: Name
    chosen_on: Count = 0
    samples: list[QualitySample]

    @model_validator(mode="after")
    def _of_its_methods(self) -> Self:
        known = [method.method for method in self.methods]
        for name in (self.best, *(n for sample in self.samples for n in sample.outputs)):
            if name not in known:
                raise ValueError(f"{printable(name, 60)} is not one of its methods")
        return self


class QualityReport(Record):
    """``quality.json``: how well each method does each composition, in eager fp32."""

    name: Name
    machine: Machine
    versions: dict[Name, Name]
    metric: Literal["rougeL", "chrf", "weighted_rouge"]
    compositions: dict[Name, CompositionResult]
    training: dict[Name, list[Point]]


class Asked(Record):
    """What every model was asked and how it answered: enough to ask the same again.

    Attributes:
        prompts: SHA-256 of the prompts' token ids, in their order.
        targets: SHA-256 of the token ids that were fed after each prompt.
        max_new_tokens: Longest answer.
        sampling: How the next token is chosen.
        seeds: Of everything that is drawn, by what it is.
    """

    prompts: Name
    targets: Name
    max_new_tokens: Some
    sampling: Literal["greedy"] = "greedy"
    seeds: dict[Name, Seed]


class TaskResult(Record):
    """The task metric, 0 to 100, in fp32 and from the artifact, on the same examples.

    ``interval`` is the bootstrap interval of the difference, in points; ``fp32_scores`` and
    ``artifact_scores`` are those of each example.
    """

    metric: Name
    fp32: Points
    artifact: Points
    difference: Difference
    interval: tuple[Difference, Difference]
    fp32_scores: tuple[Score, ...] = ()
    artifact_scores: tuple[Score, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        sizes = len(self.fp32_scores), len(self.artifact_scores)
        if sizes[0] != sizes[1]:
            raise ValueError(f"fp32_scores has {sizes[0]} and artifact_scores {sizes[1]}")
        return agreeing(self, task_trouble(self))


class ParitySample(Record):
    """One prompt, what fp32 writes and what the artifact writes."""

    input: str
    reference: str | None
    fp32: str
    artifact: str


class Findings(Record):
    """A runner compared with eager models. Measures are None where logits were not finite.

    Attributes:
        lowering: Runner against the quantized eager model, all positions.
        prefill, decode: The same, at the first target and at the others.
        one_by_one: The runner's prefill against the same prompt fed one token at a time.
        quantization: Quantized eager against fp32.
        total: Runner against fp32.
        generation: Share of prompts where the runner writes exactly the quantized eager tokens.
        differing: Share of prompts where the runner writes another text than fp32.
        samples: The first few examples.
    """

    lowering: Measures | None = None
    prefill: Measures | None = None
    decode: Measures | None = None
    one_by_one: Measures | None = None
    quantization: Measures
    total: Measures | None = None
    adapter: AdapterEffect | None = None
    task: TaskResult | None = None
    generation: Share | None = None
    differing: Share | None = None
    samples: tuple[ParitySample, ...] = ()
    gates: list[Gate]


class ArtifactResult(Findings):
    """One artifact's findings and verdict, or those of one composition of a bundle.

    Attributes:
        path: Within the run's ``artifacts``; of a bundle ``bundles`` and its name.
        files: Bytes of each file; ``bytes`` is their sum.
        bundle: Whether it is one of several compositions over one base.
        parts: Bytes of the weights by part, from the manifest, and of the rest.
        bits_per_weight: Of the base's weights, scales included.
        examples: Number of prompts.
        asked: What they were.
        lost_at: Stage that failed, None where all gates passed.
        seconds: That the validation took.
        notes: What was not checked, and why.
    """

    composition: Name
    method: Name
    runtime: Name
    precision: Name
    path: Name
    bytes: Count
    files: dict[Name, Count]
    bundle: bool = False
    parts: dict[Name, Count] = Field(default_factory=dict)
    bits_per_weight: Amount | None = None
    examples: Count
    asked: Asked | None = None
    stock: StockResult | None
    passed: bool
    lost_at: Name | None
    seconds: Amount
    notes: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        return agreeing(self, result_trouble(self))

    @property
    def form(self) -> str:
        """How it ships, such as ``int4`` or ``int4 bundle``."""
        return shown_form(self.precision, self.bundle)


class BaselineUse(Record):
    """The baseline that a run was compared with.

    Attributes:
        file: Its path.
        machine, versions: What it was made on.
        notes: How its machine and versions differ from this run's, and what was not compared.
    """

    file: Name
    machine: Machine
    versions: dict[Name, Name]
    notes: tuple[Text, ...]


class ParityReport(Record):
    """``parity.json``: every artifact of a run against its references, and maybe a baseline.

    ``devices`` are artifacts on a device against themselves on this machine.
    """

    machine: Machine
    versions: dict[Name, Name]
    artifacts: list[ArtifactResult]
    baseline: BaselineUse | None = None
    budgets: list[Budget] = Field(default_factory=list)
    devices: list[DeviceResult] = Field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every gate passed, on this machine and on devices."""
        results: list[ArtifactResult | DeviceResult] = [*self.artifacts, *self.devices]
        return all(result.passed for result in results)


R = TypeVar("R", QualityReport, ParityReport, LatencyReport, AuditReport)


def this_machine() -> Machine:
    """The machine this runs on."""
    import psutil

    return Machine(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        os=f"{platform.system()} {platform.machine()}",
    )


def environment() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    return {"python": platform.python_version(), **versions()}


def shown_path(artifact: Artifact, composition: str) -> str:
    """An artifact's ``path`` in reports."""
    place = "bundles" if artifact.is_bundle else composition
    return f"{place}/{artifact.directory.name}".removeprefix("/")


def file_sizes(directory: Path) -> dict[str, int]:
    """Bytes of every file below a directory, by its path within it."""
    entries = sorted(entry for entry in directory.rglob("*") if entry.is_file())
    return {entry.relative_to(directory).as_posix(): entry.stat().st_size for entry in entries}


def check_reports(directory: Path) -> None:
    """Check, before any work, that reports can be written into a directory without losing anything.

    Raises:
        InputError: It cannot be written, or a file of a report's name is not caliport's.
    """
    for name in (AUDIT, QUALITY, PARITY, LATENCY, REPORT, JUNIT, SUMMARY):
        check_file(directory / name)


def write_result(
    report: QualityReport | ParityReport | LatencyReport | AuditReport, path: Path
) -> None:
    """Write a report as JSON; the file appears whole or not at all.

    Raises:
        InputError: The path cannot be written.
    """
    write_text(path, report.model_dump_json(indent=1) + "\n")


def read_result(kind: type[R], path: Path) -> R:
    """Read a report back.

    Raises:
        InputError: No such file, or see ``caliport.validation.records.record.read_record``.
    """
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such file; run the stage that writes it")
    return read_record(kind, path)


def read_if_there(kind: type[R], path: Path) -> R | None:
    """As ``read_result``, or None where there is no such file."""
    return read_result(kind, path) if os.path.lexists(path) else None
