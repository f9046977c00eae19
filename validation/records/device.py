"""The records of a device: its properties, and how an artifact computes there."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from caliport.validation.records.agreement import agreeing, device_trouble
from caliport.validation.records.gate import Gate, Measures
from caliport.validation.records.record import (
    Amount,
    Count,
    Difference,
    Name,
    Points,
    Record,
    Some,
    Text,
    shown_form,
)


class DeviceUsed(Record):
    """What a result was measured on.

    Attributes:
        serial: What adb calls it.
        kind: ``phone``; ``emulator`` for a virtual machine; ``linux`` for what stands in for a
            phone: anything that is not Android, or runs a program that no phone could.
        model: Of the maker.
        android: Version; empty where it is not Android.
        abi: Such as ``arm64-v8a``.
        cores: Of the processor.
        features: Of the processor, among ``dotprod`` and ``i8mm``.
    """

    serial: Name
    kind: Literal["phone", "emulator", "linux"]
    model: Name
    android: Name
    abi: Name
    cores: Some
    features: tuple[Name, ...]

    @property
    def label(self) -> str:
        """What must be shown with it everywhere; empty for a phone."""
        return {
            "phone": "",
            "emulator": "emulated CPU: times are no results",
            "linux": "Linux stand-in: times are no results",
        }[self.kind]

    @property
    def shown(self) -> str:
        """It in one line, its label included."""
        system = f"Android {self.android}" if self.android else "no Android"
        what = f"{self.serial} ({self.model}, {system}, {self.abi})"
        return f"{what}, {self.label}" if self.label else what


class DeviceTask(Record):
    """Task metric, 0 to 100, of the same artifact on the host and on the device.

    ``interval`` is the bootstrap interval of the paired difference, in points.
    """

    metric: Name
    host: Points
    device: Points
    difference: Difference
    interval: tuple[Difference, Difference]


class DeviceResult(Record):
    """One artifact, or one composition of a bundle, on one device.

    Attributes:
        path: Of the artifact, as in reports.
        runner: What ran it, its version included; ``runner_sha256`` is of its files.
        runtime_version: Of ONNX Runtime or ExecuTorch there; ``host_version`` here. None where the
            runner does not report it.
        exact: Whether processor and version are the host's, so that no rounding is allowed.
        threads: Of the runtime.
        examples: Number of prompts.
        identical: Prompts with the host's answer, token by token.
        ties: Others that differ first where the host itself was nearer a tie than rounding.
        measures: Device against host. Logits that the device does not report are estimated, see
            ``caliport.android_harness.parity.estimated``; None for a runner that reports only text.
        seconds: From starting the runner until its end.
        lost_at: ``device`` where a gate failed.
        notes: What was not checked, and why.
    """

    composition: Name
    runtime: Name
    precision: Name
    bundle: bool
    path: Name
    device: DeviceUsed
    runner: Name
    runner_sha256: Name
    runtime_version: Name | None
    host_version: Name
    exact: bool
    threads: Some
    examples: Some
    identical: Count
    ties: Count
    measures: Measures | None
    task: DeviceTask | None
    gates: list[Gate]
    seconds: Amount
    passed: bool
    lost_at: Literal["device"] | None
    notes: tuple[Text, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.identical + self.ties > self.examples:
            raise ValueError(f"{self.identical} + {self.ties} answers of {self.examples}")
        return agreeing(self, device_trouble(self))

    @property
    def form(self) -> str:
        """How it ships, such as ``int4`` or ``int4 bundle``."""
        return shown_form(self.precision, self.bundle)

    @property
    def name(self) -> str:
        """What tells it from the others of a run."""
        return f"{self.composition}: {self.runtime} {self.form} on {self.device.serial}"
