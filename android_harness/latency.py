"""Latency of artifacts on a device, by a fixed protocol (docs/android.md).

Every artifact has one turn a round, in an order drawn from a seed. Before a turn the device is left
to cool, up to a limit. A turn is a fresh process: it loads the artifact, warms up, and times one
answer after a prompt of each length.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from caliport.android_harness import texts
from caliport.android_harness.device.facts import Facts, facts
from caliport.android_harness.parity import used
from caliport.android_harness.run import run_job
from caliport.android_harness.runners.job import Job, Timing
from caliport.android_harness.setup import DeviceSetup
from caliport.core.errors import InputError
from caliport.export import runtime as runtimes
from caliport.validation.latency.workload import (
    Candidate,
    Conditioned,
    Timings,
    Workload,
    result_of,
)
from caliport.validation.records.latency import (
    DeviceConditions,
    DeviceState,
    LatencyReport,
    LatencyResult,
)
from caliport.validation.records.record import Machine
from caliport.validation.runners import engine

if TYPE_CHECKING:
    from caliport.android_harness.device.adb import Device
    from caliport.android_harness.device.session import Session
    from caliport.android_harness.run import Ran
    from caliport.android_harness.runners.job import Result, Turn
    from caliport.android_harness.runners.kinds import JobRunner
    from caliport.core.progress import Advance

_POLL = 5.0  # seconds between two looks at its temperature


def measure(
    held: Session,
    candidates: Sequence[tuple[Candidate, JobRunner | Path]],
    workload: Workload,
    setup: DeviceSetup,
    progress: Advance | None = None,
) -> LatencyReport:
    """Measure artifacts on a device together.

    Args:
        held: The device.
        candidates: Artifacts, each with what runs it; a path is that of ``llama_main``.
        workload: What they do.
        setup: What their turns are like.
        progress: Called with the number of turns done, and with the artifact.

    Raises:
        InputError: No artifact, numbers below what can be timed, no room for any prompt, or see
            ``caliport.android_harness.run.run_job``.
    """
    rounds, new = workload.repetitions, workload.new_tokens
    if not candidates or rounds < 1 or new < 2 or not setup.lengths:
        raise InputError(
            f"latency: {len(candidates)} artifacts, {rounds} rounds, {new} new tokens; expected at "
            "least 1, 1 and 2"
        )
    setup = replace(setup, lengths=_fitting([c for c, _ in candidates], workload, setup))
    device = held.device
    order = workload.orders(len(candidates))
    found: list[list[Result]] = [[] for _ in candidates]
    states, runners = [], {}
    before = facts(device)
    airplane, screen = _settings(device)
    for number, index in enumerate((i for turns in order for i in turns), start=1):
        candidate, runner = candidates[index]
        states.append(_cooled(device, setup))
        ran = _turn(held, candidate, runner, workload, setup)
        found[index].append(ran.result)
        runners[ran.result.runner] = ran.runner_sha256
        if progress is not None:
            progress(number, f"{device.serial}: {candidate.artifact.directory.name}")
    states.append(_state(facts(device), setup, 0.0))
    conditions = DeviceConditions(
        device=used(before, *runners),
        runners=runners,
        airplane=airplane,
        screen=screen,
        celsius=setup.celsius,
        thermal=setup.thermal,
        cool_seconds=setup.cool_seconds,
        order=tuple(map(tuple, order)),
        states=tuple(states),
    )
    versions = {"caliport": metadata.version("caliport")}
    for (candidate, _), results in zip(candidates, found, strict=True):
        package = runtimes.get(candidate.artifact.runtime).package
        versions[package] = results[0].runtime_version
    system = f"Android {before.android}" if before.android else "Linux"
    return LatencyReport(
        machine=Machine(
            cpu=before.model,
            cores=before.cores,
            memory_gb=round(before.memory / 1e9, 1),
            os=f"{system} {before.abi}",
        ),
        versions=versions,
        seed=workload.seed,
        cores=setup.cores,
        bandwidth_gbs=None,
        cache_bytes=None,
        conditions=None,
        artifacts=[
            _result(candidate, workload, setup, results, conditions.noise)
            for (candidate, _), results in zip(candidates, found, strict=True)
        ],
        device=conditions,
    )


def _fitting(
    candidates: Sequence[Candidate], workload: Workload, setup: DeviceSetup
) -> tuple[int, ...]:
    """The lengths that fit every artifact's context, shortest first."""
    known = [c.artifact.context for c in candidates if c.artifact.context is not None]
    least = min(known, default=1 << 30)
    room = least - workload.new_tokens
    lengths = tuple(sorted({length for length in setup.lengths if 1 <= length <= room}))
    if not lengths:
        listed = ", ".join(map(str, setup.lengths))
        raise InputError(
            f"latency: prompts of {listed} and {workload.new_tokens} new tokens, expected one that "
            f"fits a context of {least}"
        )
    return lengths


def _turn(
    held: Session,
    candidate: Candidate,
    runner: JobRunner | Path,
    workload: Workload,
    setup: DeviceSetup,
) -> Ran:
    if isinstance(runner, Path):
        if setup.cores:
            raise InputError("latency: llama_main cannot be kept on cores; leave out --core")
        return texts.timed(held, candidate, runner, workload, setup)
    job = _job(candidate, workload, setup)
    return run_job(held, job, candidate.artifact, runner, setup.seconds)


def _job(candidate: Candidate, workload: Workload, setup: DeviceSetup) -> Job:
    artifact = candidate.artifact
    return Job(
        runtime=artifact.runtime,
        directory="",
        adapter=engine.get(artifact.runtime).selector(artifact, candidate.composition),
        threads=workload.threads,
        cores=setup.cores,
        max_new_tokens=1,
        timing=Timing(
            prompt_lengths=setup.lengths,
            new_tokens=workload.new_tokens,
            warmup=setup.warmup,
            repetitions=1,
        ),
    )


def _cooled(device: Device, setup: DeviceSetup) -> DeviceState:
    """Wait until a device is cool, within the limit; its state then."""
    start = time.monotonic()
    while True:
        waited = time.monotonic() - start
        state = _state(facts(device), setup, waited)
        left = setup.cool_seconds - waited
        if state.cool or left <= 0:
            return state
        time.sleep(min(_POLL, left))


def _state(found: Facts, setup: DeviceSetup, waited: float) -> DeviceState:
    return DeviceState(
        battery=found.battery,
        celsius=found.celsius,
        thermal=found.thermal,
        waited_seconds=waited,
        cool=(found.celsius or 0) <= setup.celsius and (found.thermal or 0) <= setup.thermal,
    )


def _settings(device: Device) -> tuple[bool | None, str | None]:
    """Whether a device is in airplane mode, and Android's wakefulness; None where it is silent."""
    airplane = device.script("settings get global airplane_mode_on").out.strip()
    wake = re.search(r"mWakefulness=(\w+)", device.script("dumpsys power").out)
    return {"0": False, "1": True}.get(airplane), None if wake is None else wake[1]


def _result(
    candidate: Candidate,
    workload: Workload,
    setup: DeviceSetup,
    found: Sequence[Result],
    noise: str | None,
) -> LatencyResult:
    """One artifact's times; those of a whole answer are of the prompt of middle length."""
    prompt = setup.lengths[len(setup.lengths) // 2]
    firsts = {
        length: [turn.first_token_seconds for turn in _turns(found, length)]
        for length in setup.lengths
    }
    steps = [turn.step_seconds for turn in _turns(found, prompt)]
    timings = Timings(
        loads=[result.load_seconds for result in found],
        firsts=firsts[prompt],
        rates=[len(times) / sum(times) for times in steps],
        tokens=[each for times in steps for each in times],
        idle=[result.idle_bytes or None for result in found],
        load_peaks=[result.loaded_bytes or None for result in found],
        peaks=[result.peak_bytes or None for result in found],
        lengths=firsts,
    )
    done = replace(workload, threads=found[0].threads)
    return result_of(candidate, done, prompt, timings, Conditioned(bool(setup.cores), noise))


def _turns(found: Sequence[Result], length: int) -> list[Turn]:
    """The timed answers after prompts of a length, one a round."""
    return [turn for result in found for turn in result.turns if turn.prompt_tokens == length]
