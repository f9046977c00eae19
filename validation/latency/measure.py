"""Host latency of artifacts, which take turns: measured, reported, never gated."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil

from caliport.core.directories import read_manifest
from caliport.core.errors import InputError
from caliport.core.machine import available_memory
from caliport.core.progress import Advance
from caliport.validation.artifact import artifact_form, compositions_of, is_foreign
from caliport.validation.latency.bandwidth import bandwidth_share, last_level_cache, token_bytes
from caliport.validation.latency.child import Child, cores_for
from caliport.validation.latency.statistics import artifact_noise, machine_noise, spread
from caliport.validation.records.latency import Conditions, LatencyReport, LatencyResult
from caliport.validation.records.reports import environment, file_sizes, shown_path, this_machine

REPETITIONS = 6  # the fewest whose range holds the median at 95 %
LOADS = 3  # rounds that begin in a fresh process
_KEPT = 0.6  # share of the available memory that waiting processes may hold
_PAUSE = 0.1  # seconds, in which the threads of the last one stop spinning


@dataclass(frozen=True)
class Subject:
    """An artifact to measure.

    Attributes:
        directory: The artifact's.
        composition: That it is reported under.
        bundled: Of a bundle, the composition to run; None for its base alone.
    """

    directory: Path
    composition: str = ""
    bundled: str | None = None


@dataclass(frozen=True)
class Course:
    """What every artifact has to do.

    Attributes:
        prompt: Token ids.
        new_tokens: Tokens to write, ends ignored; the first comes from the prefill.
        repetitions: Rounds, in each of which every artifact has one turn.
        threads: Of the runtime.
        seed: Of the order of the turns.
    """

    prompt: Sequence[int]
    new_tokens: int
    repetitions: int
    threads: int
    seed: int = 0


@dataclass
class _Found:
    """What one artifact's turns gave, in the order of the rounds. Seconds and bytes."""

    loads: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    idle: list[int | None] = field(default_factory=list)
    load_peaks: list[int | None] = field(default_factory=list)
    peaks: list[int | None] = field(default_factory=list)


def prompt_of(length: int) -> list[int]:
    """Token ids that every vocabulary has; what they are does not change how long they take."""
    draw = random.Random(0)
    return [draw.randrange(256) for _ in range(length)]


def orders(count: int, rounds: int, seed: int) -> list[list[int]]:
    """For each round the order in which things numbered from 0 have their turn."""
    draw = random.Random(seed)
    return [draw.sample(range(count), count) for _ in range(rounds)]


def measure(
    subjects: Sequence[Subject], course: Course, progress: Advance | None = None
) -> LatencyReport:
    """Measure artifacts together, each in a process of its own, in a new order every round.

    So whatever else the machine does meets all of them alike. The first ``LOADS`` turns of an
    artifact begin in a fresh process each; after that it waits between its turns, unless the
    artifacts do not fit the memory together. Before every turn a fixed reading of memory is timed:
    it tells the bandwidth and how uneasy the machine is.

    Args:
        subjects: At least one.
        course: What they have to do.
        progress: Called with the number of turns done, and with whose it was and its decode rate.

    Raises:
        InputError: No artifact, one that cannot be loaded, a prompt and answer that exceed its
            context, or numbers below what can be timed. No process is left behind.
    """
    _check(subjects, course)
    cores = cores_for(course.threads)
    meter, available = _Meter(), available_memory()
    job = {"kind": "probe", "threads": course.threads, "available": available, "cores": cores}
    found = [_Found() for _ in subjects]
    passes: list[list[float]] = []
    with (
        Child("memory bandwidth", job, course.threads) as probe,
        _Processes(course, cores, _KEPT * available) as processes,
    ):
        for number, order in enumerate(orders(len(subjects), course.repetitions, course.seed)):
            for index in order:
                time.sleep(_PAUSE)
                passes.append(probe.turn()["passes"])
                processes.turn(subjects[index], found[index], keep=number + 1 >= LOADS)
                if progress is not None:
                    rate = found[index].rates[-1]
                    progress(len(passes), f"{_name(subjects[index])}: {rate:.0f} tok/s")
        gigabytes = probe.ready["size"] / min(map(min, passes)) / 1e9
    conditions = meter.conditions([sum(times) for times in passes])
    return LatencyReport(
        machine=this_machine(),
        versions=environment(),
        seed=course.seed,
        cores=cores,
        bandwidth_gbs=gigabytes,
        cache_bytes=last_level_cache(),
        conditions=conditions,
        artifacts=[
            _result(subject, course, bool(cores), its, gigabytes, conditions.noise)
            for subject, its in zip(subjects, found, strict=True)
        ],
    )


class _Processes:
    """The processes that artifacts are measured in; all of them end with the context."""

    def __init__(self, course: Course, cores: tuple[int, ...], room: float) -> None:
        self._course, self._cores, self._room = course, cores, room
        self._waiting: dict[Subject, Child] = {}
        self._resident: dict[Subject, int] = {}

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for child in self._waiting.values():
            child.stop()

    def turn(self, subject: Subject, found: _Found, keep: bool) -> None:
        """Load an artifact unless it waits, and let it have its turn.

        Args:
            subject: The artifact.
            found: Takes what the turn gave.
            keep: Whether its process may wait for the next turn, if all that wait fit the memory.
        """
        if subject not in self._waiting:
            self._waiting[subject] = child = self._start(subject)
            found.loads.append(child.ready["load"])
            found.idle.append(child.ready["idle"])
            found.load_peaks.append(child.ready["load_peak"])
        answer = self._waiting[subject].turn()
        answers: list[list[float]] = answer["answers"]
        found.firsts.append(median(times[0] for times in answers))
        found.rates.append(median((len(times) - 1) / sum(times[1:]) for times in answers))
        found.tokens += [each for times in answers for each in times[1:]]
        found.peaks.append(answer["peak"])
        self._resident[subject] = answer["resident"]
        if not keep or sum(self._resident.values()) > self._room:
            self._waiting.pop(subject).stop()
            del self._resident[subject]

    def _start(self, subject: Subject) -> Child:
        job = {
            "kind": "artifact",
            "directory": str(subject.directory),
            "bundled": subject.bundled,
            "prompt": list(self._course.prompt),
            "new_tokens": self._course.new_tokens,
            "threads": self._course.threads,
            "cores": self._cores,
        }
        return Child(str(subject.directory), job, self._course.threads)


class _Meter:
    """What else the machine does from now on until it is asked."""

    def __init__(self) -> None:
        self._load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self._machine, self._own = psutil.cpu_times(), sum(os.times()[:4])
        self._start = time.monotonic()

    def conditions(self, calibration: list[float]) -> Conditions:
        """The conditions; our own processes must have ended."""
        seconds = time.monotonic() - self._start
        now = psutil.cpu_times()._asdict()
        passed = {name: now[name] - was for name, was in self._machine._asdict().items()}
        busy = sum(passed.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
        known = sum(time for name, time in passed.items() if not name.startswith("guest"))
        times = spread(calibration)
        return Conditions(
            calibration=times,
            load_average=self._load,
            steal=passed["steal"] / max(known, 0.01) if "steal" in passed else None,
            others=max(0.0, busy - sum(os.times()[:4]) + self._own) / seconds,
            noise=machine_noise(times),
        )


def _name(subject: Subject) -> str:
    return " ".join(filter(None, (subject.composition, subject.directory.name)))


def _check(subjects: Sequence[Subject], course: Course) -> None:
    length, new = len(course.prompt), course.new_tokens
    if course.repetitions < 1 or new < 2 or not length or course.threads < 1:
        raise InputError(
            f"latency: {course.repetitions} repetitions of {new} new tokens after {length} with "
            f"{course.threads} threads; expected at least 1, 2, 1 and 1"
        )
    if not subjects:
        raise InputError("latency: found no artifact, expected at least one")
    for number, subject in enumerate(subjects):
        artifact_form(subject.directory)
        if subject in subjects[:number]:
            raise InputError(f"{subject.directory}: found twice, expected each artifact once")
        context = manifest_of(subject.directory).get("context")
        if isinstance(context, int) and length + new > context:
            raise InputError(
                f"latency: {length} + {new} tokens exceed the context of {context} of "
                f"{subject.directory}"
            )


def _result(
    subject: Subject,
    course: Course,
    pinned: bool,
    found: _Found,
    gigabytes: float,
    machine_noise: str | None,
) -> LatencyResult:
    runtime, precision = artifact_form(subject.directory)
    sizes = file_sizes(subject.directory)
    bundle = compositions_of(subject.directory) is not None
    prompt, new = len(course.prompt), course.new_tokens
    first_token, decode_rate = spread(found.firsts), spread(found.rates)
    read = token_bytes(manifest_of(subject.directory), prompt + new / 2)
    return LatencyResult(
        composition=subject.composition,
        runtime=runtime,
        precision=precision,
        path=shown_path(subject.directory, subject.composition, bundle),
        bytes=sum(sizes.values()),
        files=sizes,
        bundle=bundle,
        threads=course.threads,
        pinned=pinned,
        prompt_tokens=prompt,
        new_tokens=new,
        repetitions=course.repetitions,
        load_seconds=spread(found.loads),
        first_token_seconds=first_token,
        decode_rate=decode_rate,
        token_p90_seconds=p90(found.tokens),
        idle_bytes=_highest(found.idle),
        load_peak_bytes=_highest(found.load_peaks),
        peak_bytes=_highest(found.peaks),
        token_bytes=read,
        bandwidth_share=bandwidth_share(read, decode_rate.median, gigabytes, last_level_cache()),
        noise=machine_noise or artifact_noise(first_token, decode_rate),
    )


def manifest_of(directory: Path) -> dict[str, Any]:
    """Of an artifact; empty for one of another tool."""
    return {} if is_foreign(directory) else read_manifest(directory)


def p90(times: list[float]) -> float:
    """Nine of ten of at least one time lie within this one."""
    return quantiles(times, n=10, method="inclusive")[-1] if len(times) > 1 else times[0]


def _highest(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
