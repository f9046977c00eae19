"""Records of ``latency.json``: times and memory of artifacts, and the machine's state meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from math import isclose
from statistics import median
from typing import Self

from pydantic import Field, model_validator

from caliport.validation.records.agreement import agreeing, bytes_trouble
from caliport.validation.records.device import DeviceUsed
from caliport.validation.records.record import (
    Amount,
    Count,
    Machine,
    Name,
    Positive,
    Record,
    Seed,
    Share,
    Some,
    Text,
    shown_form,
)


class Spread(Record):
    """Repeated measurements.

    Attributes:
        median, low, high: The middle one, the lowest and the highest.
        interval: Holds the true median with a probability of ``level``, whatever the distribution,
            where the measurements are independent; its ends are two of them.
        level: 0.95 at least, or what the whole range reaches where they are fewer than six.
        values: In the order in which they were made; of a rate or a time to the first token, one a
            round.
    """

    median: Positive
    low: Positive
    high: Positive
    interval: tuple[Positive, Positive]
    level: Share
    values: tuple[Positive, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _of_its_values(self) -> Self:
        known = min(self.values), median(self.values), max(self.values)
        said = self.low, self.median, self.high
        if not all(isclose(a, b) for a, b in zip(known, said, strict=True)):
            raise ValueError("lowest, median and highest are not those of its values")
        if not self.low <= self.interval[0] <= self.interval[1] <= self.high:
            raise ValueError("the interval is not within its values")
        return self


class LengthTimes(Record):
    """Times to the first token after prompts of one length.

    Attributes:
        first_token_seconds: One a round.
        p90_seconds: Nine of ten came within this time.
    """

    prompt_tokens: Some
    first_token_seconds: Spread
    p90_seconds: Positive

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second, by the median."""
        return self.prompt_tokens / self.first_token_seconds.median


class LatencyResult(Record):
    """Times and memory of one artifact on one machine.

    Attributes:
        files: Bytes of each file; ``bytes`` is their sum.
        bundle: Whether it is one of several compositions over one base.
        threads: Of the runtime.
        pinned: Whether its process was pinned to as many cores as threads.
        repetitions: Rounds; a round's time is the median of the answers of one turn.
        load_seconds: In a fresh process, files in the page cache, libraries imported: from opening
            to the first token read.
        first_token_seconds: From the prompt to the first token.
        decode_rate: Tokens a second after the first.
        token_p90_seconds: Nine of ten tokens after the first came within this time.
        idle_bytes, load_peak_bytes, peak_bytes: Resident memory of the process before the load,
            at its highest after the load, and after all answers; None where the system does not
            say.
        token_bytes: Weights and cache read for each token that is decoded; None where the manifest
            does not say.
        bandwidth_share: ``token_bytes`` times the decode rate, of the machine's read bandwidth;
            None where ``token_bytes`` is not known or fits the processor's cache.
        noise: Why the times cannot be compared; None where they can.
        lengths: On a device, prompts of several lengths, ``prompt_tokens`` among them.
    """

    composition: Name
    runtime: Name
    precision: Name
    path: Name
    bytes: Count
    files: dict[Name, Count]
    bundle: bool = False
    threads: Some
    pinned: bool
    prompt_tokens: Some
    new_tokens: Some
    repetitions: Some
    load_seconds: Spread
    first_token_seconds: Spread
    decode_rate: Spread
    token_p90_seconds: Positive
    idle_bytes: Count | None
    load_peak_bytes: Count | None
    peak_bytes: Count | None
    token_bytes: Count | None
    bandwidth_share: Amount | None
    noise: Text | None
    lengths: tuple[LengthTimes, ...] = ()

    @model_validator(mode="after")
    def _of_its_files(self) -> Self:
        return agreeing(self, bytes_trouble(self.bytes, self.files))

    @property
    def form(self) -> str:
        """How it ships, such as ``int4`` or ``int4 bundle``."""
        return shown_form(self.precision, self.bundle)

    @property
    def noisy(self) -> bool:
        """Whether the times are too noisy to compare."""
        return self.noise is not None


class Conditions(Record):
    """The machine's state while artifacts took their turns.

    Attributes:
        calibration: Seconds of the same reading of memory before every turn.
        load_average: Processes that ran or waited, over the minute before.
        steal: Share of the cores' time that a hypervisor gave to others.
        others: Cores that other processes kept busy, on average.
        noise: Why nothing measured meanwhile can be compared; None where it can.
    """

    calibration: Spread
    load_average: Amount | None
    steal: Amount | None
    others: Amount
    noise: Text | None


class DeviceState(Record):
    """A device at one moment.

    Attributes:
        battery: Level from 0 to 1; None where it has none.
        celsius: The battery's temperature.
        thermal: Android's thermal status, 0 (none) to 6 (shutdown).
        waited_seconds: That it was left to cool before.
        cool: Whether it was as cool as asked for.
    """

    battery: Amount | None
    celsius: float | None
    thermal: Count | None
    waited_seconds: Amount
    cool: bool


class DeviceConditions(Record):
    """How artifacts were timed on a device.

    Attributes:
        device: Which.
        runners: SHA-256 of what ran artifacts, by its name and version.
        airplane: Whether it was in airplane mode; None where it does not report it.
        screen: Android's wakefulness, such as ``Awake``; None likewise.
        celsius, thermal: How cool it had to be before each turn.
        cool_seconds: The longest to wait for that, before each turn.
        order: Of the artifacts in each round, drawn from the report's seed.
        states: Before each turn in that order, and after the last.
    """

    device: DeviceUsed
    runners: dict[Name, Name]
    airplane: bool | None
    screen: Name | None
    celsius: float
    thermal: Count
    cool_seconds: Amount
    order: tuple[tuple[Count, ...], ...]
    states: tuple[DeviceState, ...]

    @property
    def waited_seconds(self) -> float:
        """All waiting for it to cool."""
        return sum(state.waited_seconds for state in self.states)

    @property
    def noise(self) -> str | None:
        """Why its times are no results; None where they are."""
        if self.device.label:
            return self.device.label
        warm = sum(not state.cool for state in self.states[:-1])
        if not warm:
            return None
        return (
            f"{warm} of {len(self.states) - 1} turns began above {self.celsius:g} °C or thermal "
            f"status {self.thermal}, after {self.cool_seconds:g} s to cool"
        )


class LatencyReport(Record):
    """``latency.json``: times are reported and never gated but against a baseline.

    Attributes:
        seed: Of the order of the turns.
        cores: That the processes were pinned to; none where the system has no way to.
        bandwidth_gbs: Highest rate of reading memory with as many threads, GB (1e9 bytes) a second;
            None on a device.
        cache_bytes: The processor's last-level cache; None where the system does not say.
        conditions: Of this machine; None on a device, which has ``device`` instead.
    """

    machine: Machine
    versions: dict[Name, Name]
    seed: Seed
    cores: tuple[Count, ...]
    bandwidth_gbs: Positive | None
    cache_bytes: Count | None
    conditions: Conditions | None
    artifacts: list[LatencyResult]
    device: DeviceConditions | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("load_seconds", "first_token_seconds", "decode_rate"):
            _one_length((getattr(each, name).values for each in self.artifacts), name)
        return self


def _one_length(lists: Iterable[tuple[float, ...]], name: str) -> None:
    sizes = sorted({len(values) for values in lists})
    if len(sizes) > 1:
        raise ValueError(
            f"{name}: {sizes[0]} values of one artifact and {sizes[-1]} of another, expected as "
            "many of each"
        )
