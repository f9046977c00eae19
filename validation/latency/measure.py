"""Latency of artifacts on this machine, measured in turns; reported, never gated."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from statistics import median

import psutil

from caliport.core.errors import InputError
from caliport.core.machine import available_memory
from caliport.core.progress import Advance
from caliport.validation.latency.bandwidth import last_level_cache
from caliport.validation.latency.child import Child, cores_for
from caliport.validation.latency.statistics import machine_noise, spread
from caliport.validation.latency.workload import (
    Candidate,
    Conditioned,
    Timings,
    Workload,
    check_candidates,
    result_of,
)
from caliport.validation.records.latency import Conditions, LatencyReport
from caliport.validation.records.reports import environment, this_machine
from caliport.validation.runners.engine import get as get_engine

LOADS = 3  # rounds that begin in a fresh process
_KEPT = 0.6  # share of the available memory that waiting processes may hold
_PAUSE = 0.1  # seconds, in which the threads of the last one stop spinning


def measure(
    candidates: Sequence[Candidate],
    workload: Workload,
    prompt: Sequence[int],
    progress: Advance | None = None,
) -> LatencyReport:
    """Measure artifacts together, each in its own process, in a new order every round.

    So other load on the machine affects all of them alike. The first ``LOADS`` turns of a candidate
    begin in a fresh process each; after that its process waits between turns, unless all of them do
    not fit into memory together. Before every turn the same reading of memory is timed, which gives
    the bandwidth and shows how noisy the machine is.

    Args:
        candidates: At least one.
        workload: What they do.
        prompt: Token ids that they read.
        progress: Called with the number of turns done, and with the candidate and its decode rate.

    Raises:
        InputError: No artifact, one that cannot be loaded, a prompt and answer that exceed its
            context, or numbers below what can be timed. No process is left behind.
    """
    _check(candidates, workload, len(prompt))
    cores = cores_for(workload.threads)
    meter, available = _Meter(), available_memory()
    job = {"kind": "memory", "threads": workload.threads, "available": available, "cores": cores}
    found = [Timings() for _ in candidates]
    passes: list[list[float]] = []
    with (
        Child("memory bandwidth", job, workload.threads) as memory,
        _Processes(workload, prompt, cores, _KEPT * available) as processes,
    ):
        for number, order in enumerate(workload.orders(len(candidates))):
            for index in order:
                time.sleep(_PAUSE)
                passes.append(memory.turn()["passes"])
                processes.turn(candidates[index], found[index], keep=number + 1 >= LOADS)
                if progress is not None:
                    rate = found[index].rates[-1]
                    progress(len(passes), f"{_name(candidates[index])}: {rate:.0f} tok/s")
        gigabytes = memory.ready["size"] / min(map(min, passes)) / 1e9
    conditions = meter.conditions([sum(times) for times in passes])
    where = Conditioned(bool(cores), conditions.noise, gigabytes)
    return LatencyReport(
        machine=this_machine(),
        versions=environment(),
        seed=workload.seed,
        cores=cores,
        bandwidth_gbs=gigabytes,
        cache_bytes=last_level_cache(),
        conditions=conditions,
        artifacts=[
            result_of(candidate, workload, len(prompt), timings, where)
            for candidate, timings in zip(candidates, found, strict=True)
        ],
    )


class _Processes:
    """The processes that artifacts are measured in; all of them end with the context."""

    def __init__(
        self, workload: Workload, prompt: Sequence[int], cores: tuple[int, ...], room: float
    ) -> None:
        self._workload, self._prompt = workload, prompt
        self._cores, self._room = cores, room
        self._waiting: dict[Candidate, Child] = {}
        self._resident: dict[Candidate, int] = {}

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *error: object) -> None:
        for child in self._waiting.values():
            child.stop()

    def turn(self, candidate: Candidate, found: Timings, keep: bool) -> None:
        """Load an artifact unless it waits, and let it have its turn.

        Args:
            candidate: The artifact.
            found: Takes what the turn gave.
            keep: Whether its process may wait for the next turn, if all that wait fit the memory.
        """
        if candidate not in self._waiting:
            self._waiting[candidate] = child = self._start(candidate)
            found.loads.append(child.ready["load"])
            found.idle.append(child.ready["idle"])
            found.load_peaks.append(child.ready["load_peak"])
        answer = self._waiting[candidate].turn()
        answers: list[list[float]] = answer["answers"]
        found.firsts.append(median(times[0] for times in answers))
        found.rates.append(median((len(times) - 1) / sum(times[1:]) for times in answers))
        found.tokens += [each for times in answers for each in times[1:]]
        found.peaks.append(answer["peak"])
        self._resident[candidate] = answer["resident"]
        if not keep or sum(self._resident.values()) > self._room:
            self._waiting.pop(candidate).stop()
            del self._resident[candidate]

    def _start(self, candidate: Candidate) -> Child:
        place = str(candidate.artifact.directory)
        job = {
            "kind": "artifact",
            "directory": place,
            "composition": candidate.composition,
            "prompt": list(self._prompt),
            "new_tokens": self._workload.new_tokens,
            "threads": self._workload.threads,
            "cores": self._cores,
        }
        return Child(place, job, self._workload.threads)


class _Meter:
    """Measures what else the machine does, from now on until it is asked."""

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


def _name(candidate: Candidate) -> str:
    return " ".join(filter(None, (candidate.label, candidate.artifact.directory.name)))


def _check(candidates: Sequence[Candidate], workload: Workload, length: int) -> None:
    new = workload.new_tokens
    if workload.repetitions < 1 or new < 2 or not length or workload.threads < 1:
        raise InputError(
            f"latency: {workload.repetitions} repetitions of {new} new tokens after {length} with "
            f"{workload.threads} threads; expected at least 1, 2, 1 and 1"
        )
    check_candidates(candidates)
    for candidate in candidates:
        candidate.artifact.check()
        get_engine(candidate.artifact.runtime).try_program(candidate.artifact)
        context = candidate.artifact.context
        if context is not None and length + new > context:
            raise InputError(
                f"latency: {length} + {new} tokens exceed the context of {context} of "
                f"{candidate.artifact.directory}"
            )
