"""What is timed, on this machine or on a device, and the result that its turns add up to."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import quantiles

from caliport.core.errors import InputError
from caliport.export.artifact import Artifact
from caliport.validation.latency.bandwidth import bandwidth_share, last_level_cache, token_bytes
from caliport.validation.latency.statistics import artifact_noise, spread
from caliport.validation.records.latency import LatencyResult, LengthTimes
from caliport.validation.records.reports import file_sizes, shown_path

REPETITIONS = 6  # the fewest whose range holds the median at 95 %


@dataclass(frozen=True)
class Candidate:
    """An artifact, or one composition of a bundle, to time.

    Attributes:
        artifact: What to run.
        label: Its name in the report.
        composition: Of a bundle, the composition to run; None for its base alone.
    """

    artifact: Artifact
    label: str = ""
    composition: str | None = None


@dataclass(frozen=True)
class Workload:
    """What every candidate does.

    Attributes:
        new_tokens: Tokens to write after a prompt, ends ignored; the first comes from the prefill.
        repetitions: Rounds, in each of which every candidate has one turn.
        threads: Of the runtime.
        seed: Of the order of the turns.
    """

    new_tokens: int
    repetitions: int = REPETITIONS
    threads: int = 1
    seed: int = 0

    def orders(self, count: int) -> list[list[int]]:
        """For each round, the order in which candidates numbered from 0 have their turn."""
        draw = random.Random(self.seed)
        return [draw.sample(range(count), count) for _ in range(self.repetitions)]


@dataclass
class Timings:
    """What one candidate's turns gave, in the order of the rounds. Seconds and bytes.

    Attributes:
        loads: Of each load.
        firsts: To the first token, one a round.
        rates: Tokens a second after the first, one a round.
        tokens: Of each token after the first.
        idle, load_peaks, peaks: Resident memory before and after each load, and after each turn;
            None where the system does not tell.
        lengths: On a device, ``firsts`` by tokens of the prompt.
    """

    loads: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    idle: list[int | None] = field(default_factory=list)
    load_peaks: list[int | None] = field(default_factory=list)
    peaks: list[int | None] = field(default_factory=list)
    lengths: dict[int, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Conditioned:
    """What all results of one machine or device have in common.

    Attributes:
        pinned: Whether processes were pinned to cores.
        noise: Why nothing measured there can be compared; None where it can.
        bandwidth_gbs: Read bandwidth, GB (1e9 bytes) a second; None where it was not measured.
    """

    pinned: bool
    noise: str | None
    bandwidth_gbs: float | None = None


def prompt_of(length: int) -> list[int]:
    """Token ids that every vocabulary has; what they are does not change how long they take."""
    draw = random.Random(0)
    return [draw.randrange(256) for _ in range(length)]


def result_of(
    candidate: Candidate,
    workload: Workload,
    prompt_tokens: int,
    timings: Timings,
    where: Conditioned,
) -> LatencyResult:
    """The result of a candidate's turns.

    Args:
        candidate: What was timed.
        workload: What it did.
        prompt_tokens: Tokens of the prompt before ``timings.rates``.
        timings: What its turns gave.
        where: Of the machine or device.
    """
    artifact, sizes = candidate.artifact, file_sizes(candidate.artifact.directory)
    first_token, decode_rate = spread(timings.firsts), spread(timings.rates)
    read = token_bytes(artifact.manifest, prompt_tokens + workload.new_tokens / 2)
    share = None
    if where.bandwidth_gbs is not None:
        share = bandwidth_share(read, decode_rate.median, where.bandwidth_gbs, last_level_cache())
    return LatencyResult(
        composition=candidate.label,
        runtime=artifact.runtime,
        precision=artifact.precision,
        path=shown_path(artifact, candidate.label),
        bytes=sum(sizes.values()),
        files=sizes,
        bundle=artifact.is_bundle,
        threads=workload.threads,
        pinned=where.pinned,
        prompt_tokens=prompt_tokens,
        new_tokens=workload.new_tokens,
        repetitions=workload.repetitions,
        load_seconds=spread(timings.loads),
        first_token_seconds=first_token,
        decode_rate=decode_rate,
        token_p90_seconds=p90(timings.tokens),
        idle_bytes=_highest(timings.idle),
        load_peak_bytes=_highest(timings.load_peaks),
        peak_bytes=_highest(timings.peaks),
        token_bytes=read,
        bandwidth_share=share,
        noise=where.noise or artifact_noise(first_token, decode_rate),
        lengths=tuple(
            LengthTimes(
                prompt_tokens=length, first_token_seconds=spread(firsts), p90_seconds=p90(firsts)
            )
            for length, firsts in timings.lengths.items()
        ),
    )


def check_candidates(candidates: Sequence[Candidate]) -> None:
    """Check that there is something to time, and nothing twice.

    Raises:
        InputError: There is not, or the first that is.
    """
    if not candidates:
        raise InputError("latency: found no artifact, expected at least one")
    for number, candidate in enumerate(candidates):
        if candidate in candidates[:number]:
            place = candidate.artifact.directory
            raise InputError(f"{place}: found twice, expected each artifact once")


def p90(times: Sequence[float]) -> float:
    """The time within which nine of ten of at least one time are."""
    return quantiles(times, n=10, method="inclusive")[-1] if len(times) > 1 else times[0]


def _highest(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
