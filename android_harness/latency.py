"""Latency of artifacts on a device by a written protocol (docs/android.md).

Every artifact has one turn a round, in an order drawn from a seed. Before a turn the device is left
to cool, up to a limit. A turn is a fresh process: it loads the artifact, warms up, and times one
answer after a prompt of each length.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from caliport.android_harness import texts as llama_device
from caliport.android_harness.device.facts import Facts, facts
from caliport.android_harness.parity import PACKAGES, adapter_of, used
from caliport.android_harness.run import run_job
from caliport.android_harness.runners.job import Job, Timing
from caliport.core.errors import InputError
from caliport.validation.artifact import artifact_form, compositions_of
from caliport.validation.latency.bandwidth import token_bytes
from caliport.validation.latency.measure import Subject, manifest_of, orders, p90
from caliport.validation.latency.statistics import artifact_noise, spread
from caliport.validation.records.latency import (
    DeviceConditions,
    DeviceState,
    LatencyReport,
    LatencyResult,
    LengthTimes,
)
from caliport.validation.records.record import Machine
from caliport.validation.records.reports import file_sizes, shown_path

if TYPE_CHECKING:
    from caliport.android_harness.device.adb import Device
    from caliport.android_harness.device.session import Session
    from caliport.android_harness.run import Ran
    from caliport.android_harness.runners.job import Result, Turn
    from caliport.android_harness.runners.kinds import JobRunner
    from caliport.core.progress import Advance

LENGTHS = (32, 128, 512)
_POLL = 5.0  # seconds between two looks whether it has cooled


@dataclass(frozen=True)
class Course:
    """What every artifact has to do, and how cool the device must be.

    Attributes:
        lengths: Tokens of the prompts; those that some artifact's context has no room for are left
            out.
        new_tokens: Tokens to write after each, at least 2.
        rounds: In each of which every artifact has one turn.
        threads: Of the runtime.
        cores: To stay on; empty leaves that to the device.
        warmup: Answers of each length before those that are timed.
        seed: Of the order of the turns.
        celsius: The battery's temperature that is cool enough.
        thermal: Android's thermal status that is.
        cool_seconds: The longest to wait for that, before each turn.
        seconds: The longest that a turn may take.
    """

    lengths: tuple[int, ...] = LENGTHS
    new_tokens: int = 32
    rounds: int = 6
    threads: int = 4
    cores: tuple[int, ...] = ()
    warmup: int = 1
    seed: int = 0
    celsius: float = 35.0
    thermal: int = 0
    cool_seconds: float = 300.0
    seconds: float = 1800.0


def measure(
    held: Session,
    subjects: Sequence[tuple[Subject, JobRunner | Path]],
    course: Course,
    progress: Advance | None = None,
) -> LatencyReport:
    """Measure artifacts on a device together.

    Args:
        held: The device.
        subjects: Artifacts, each with what runs it; a path is that of ``llama_main``.
        course: What they have to do.
        progress: Called with the number of turns done, and with whose it was.

    Raises:
        InputError: No artifact, numbers below what can be timed, no room for any prompt, or see
            ``caliport.android_harness.run.run_job``.
    """
    if not subjects or course.rounds < 1 or course.new_tokens < 2 or not course.lengths:
        raise InputError(
            f"latency: {len(subjects)} artifacts, {course.rounds} rounds, {course.new_tokens} new "
            "tokens; expected at least 1, 1 and 2"
        )
    lengths = _fitting([subject for subject, _ in subjects], course)
    device = held.device
    order = orders(len(subjects), course.rounds, course.seed)
    found: list[list[Result]] = [[] for _ in subjects]
    states, runners = [], {}
    before = facts(device)
    airplane, screen = _settings(device)
    for number, index in enumerate((i for turns in order for i in turns), start=1):
        subject, runner = subjects[index]
        states.append(_cooled(device, course))
        ran = _turn(held, subject, runner, course, lengths)
        found[index].append(ran.result)
        runners[ran.result.runner] = ran.runner_sha256
        if progress is not None:
            progress(number, f"{device.serial}: {subject.directory.name}")
    states.append(_state(facts(device), course, 0.0))
    conditions = DeviceConditions(
        device=used(before, *runners),
        runners=runners,
        airplane=airplane,
        screen=screen,
        celsius=course.celsius,
        thermal=course.thermal,
        cool_seconds=course.cool_seconds,
        order=tuple(map(tuple, order)),
        states=tuple(states),
    )
    versions = {"caliport": metadata.version("caliport")}
    for (subject, _), its in zip(subjects, found, strict=True):
        versions[PACKAGES[artifact_form(subject.directory)[0]]] = its[0].runtime_version
    system = f"Android {before.android}" if before.android else "Linux"
    return LatencyReport(
        machine=Machine(
            cpu=before.model,
            cores=before.cores,
            memory_gb=round(before.memory / 1e9, 1),
            os=f"{system} {before.abi}",
        ),
        versions=versions,
        seed=course.seed,
        cores=course.cores,
        bandwidth_gbs=None,
        cache_bytes=None,
        conditions=None,
        artifacts=[
            _result(subject, course, lengths, its, conditions.noise)
            for (subject, _), its in zip(subjects, found, strict=True)
        ],
        device=conditions,
    )


def _fitting(subjects: Sequence[Subject], course: Course) -> tuple[int, ...]:
    """The lengths that every artifact's context has room for, shortest first."""
    known = [manifest_of(subject.directory).get("context") for subject in subjects]
    least = min((int(context) for context in known if context is not None), default=1 << 30)
    room = least - course.new_tokens
    lengths = tuple(sorted({length for length in course.lengths if 1 <= length <= room}))
    if not lengths:
        raise InputError(
            f"latency: prompts of {', '.join(map(str, course.lengths))} and {course.new_tokens} "
            f"new tokens, expected one that fits a context of {least}"
        )
    return lengths


def _turn(
    held: Session,
    subject: Subject,
    runner: JobRunner | Path,
    course: Course,
    lengths: tuple[int, ...],
) -> Ran:
    if isinstance(runner, Path):
        if course.cores:
            raise InputError("latency: llama_main cannot be kept on cores; leave out --core")
        return llama_device.timed(
            held,
            subject.directory,
            runner,
            lengths,
            bundled=subject.bundled,
            new_tokens=course.new_tokens,
            threads=course.threads,
            seconds=course.seconds,
        )
    job = _job(subject, course, lengths)
    return run_job(held, job, subject.directory, runner, course.seconds)


def _job(subject: Subject, course: Course, lengths: tuple[int, ...]) -> Job:
    runtime, _ = artifact_form(subject.directory)
    return Job.model_validate(
        {
            "runtime": runtime,
            "directory": "",
            "adapter": adapter_of(subject.directory, subject.bundled),
            "threads": course.threads,
            "cores": course.cores,
            "max_new_tokens": 1,
            "timing": Timing(
                prompt_lengths=lengths,
                new_tokens=course.new_tokens,
                warmup=course.warmup,
                repetitions=1,
            ),
        }
    )


def _cooled(device: Device, course: Course) -> DeviceState:
    """Wait until a device is cool, within the limit; its state then."""
    start = time.monotonic()
    while True:
        waited = time.monotonic() - start
        state = _state(facts(device), course, waited)
        left = course.cool_seconds - waited
        if state.cool or left <= 0:
            return state
        time.sleep(min(_POLL, left))


def _state(found: Facts, course: Course, waited: float) -> DeviceState:
    return DeviceState(
        battery=found.battery,
        celsius=found.celsius,
        thermal=found.thermal,
        waited_seconds=waited,
        cool=(found.celsius or 0) <= course.celsius and (found.thermal or 0) <= course.thermal,
    )


def _settings(device: Device) -> tuple[bool | None, str | None]:
    """Whether a device is in airplane mode, and Android's wakefulness; None where it is silent."""
    airplane = device.script("settings get global airplane_mode_on").out.strip()
    wake = re.search(r"mWakefulness=(\w+)", device.script("dumpsys power").out)
    return {"0": False, "1": True}.get(airplane), None if wake is None else wake[1]


def _result(
    subject: Subject,
    course: Course,
    lengths: tuple[int, ...],
    found: Sequence[Result],
    noise: str | None,
) -> LatencyResult:
    """One artifact's times; those of a whole answer are of the prompt of middle length."""
    runtime, precision = artifact_form(subject.directory)
    sizes = file_sizes(subject.directory)
    bundle = compositions_of(subject.directory) is not None
    prompt = lengths[len(lengths) // 2]
    firsts = {
        length: [turn.first_token_seconds for turn in _turns(found, length)] for length in lengths
    }
    steps = [turn.step_seconds for turn in _turns(found, prompt)]
    first_token = spread(firsts[prompt])
    decode_rate = spread([len(times) / sum(times) for times in steps])
    return LatencyResult(
        composition=subject.composition,
        runtime=runtime,
        precision=precision,
        path=shown_path(subject.directory, subject.composition, bundle),
        bytes=sum(sizes.values()),
        files=sizes,
        bundle=bundle,
        threads=found[0].threads,
        pinned=bool(course.cores),
        prompt_tokens=prompt,
        new_tokens=course.new_tokens,
        repetitions=course.rounds,
        load_seconds=spread([result.load_seconds for result in found]),
        first_token_seconds=first_token,
        decode_rate=decode_rate,
        token_p90_seconds=p90([each for times in steps for each in times]),
        idle_bytes=max(result.idle_bytes for result in found) or None,
        load_peak_bytes=max(result.loaded_bytes for result in found) or None,
        peak_bytes=max(result.peak_bytes for result in found) or None,
        token_bytes=token_bytes(manifest_of(subject.directory), prompt + course.new_tokens / 2),
        bandwidth_share=None,
        noise=noise or artifact_noise(first_token, decode_rate),
        lengths=tuple(
            LengthTimes(
                prompt_tokens=length,
                first_token_seconds=spread(times),
                p90_seconds=p90(times),
            )
            for length, times in firsts.items()
        ),
    )


def _turns(found: Sequence[Result], length: int) -> list[Turn]:
    """The timed answers after prompts of a length, one a round."""
    return [turn for result in found for turn in result.turns if turn.prompt_tokens == length]
