"""Run a ``Job`` on a device: push, start, wait, pull, check."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from caliport.android_harness.device.facts import Facts, artifact_files, check_abi, facts, obstacles
from caliport.android_harness.device.session import Session, session
from caliport.android_harness.runners.job import JOB, RESULT, Job, Result, check_result
from caliport.core.directories import content_hash
from caliport.core.errors import InputError
from caliport.core.untrusted import parse_json, shown
from caliport.export.artifact import Artifact
from caliport.validation.records.record import first_problem

if TYPE_CHECKING:
    from caliport.android_harness.device.adb import Completed, Device
    from caliport.android_harness.runners.kinds import JobRunner

_SIGNALS = {137: "killed (out of memory, or by somebody)", 139: "segmentation fault"}
_FAULTS = {126: "cannot be executed", 127: "no such program on the device", **_SIGNALS}


@dataclass(frozen=True)
class Ran:
    """What a device answered.

    Attributes:
        result: Of the runner.
        device: Which device it was, and its state before.
        after: Its state afterwards.
        runner_sha256: Of the runner's directory (``content_hash``), or of its program where that
            was on the device already.
        seconds: From starting the runner until its end.
    """

    result: Result
    device: Facts
    after: Facts
    runner_sha256: str
    seconds: float


def run_job(held: Session, job: Job, artifact: Artifact, runner: JobRunner, seconds: float) -> Ran:
    """Run a job on a device.

    Args:
        held: The device.
        job: What to do; its ``directory`` is set here.
        artifact: What to run.
        runner: What runs it.
        seconds: The longest that it may take once it is started.

    Raises:
        InputError: The artifact or the runner does not suit the device, the runner failed, took
            longer, or wrote something else than a result; no program of it is left.
        DeviceGone: The device went away.
    """
    if runner.runtime != job.runtime:
        raise InputError(f"job for {job.runtime}: found a runner for {runner.runtime}")
    before = facts(held.device)
    reasons = obstacles(before, artifact)
    if reasons:
        raise InputError(f"{artifact.directory} on device {before.serial}: {reasons[0]}")
    place = ""
    if runner.directory is None:
        digest = _hash_there(held, runner.command[0])
    else:
        files = _tree(runner.directory)
        check_abi(before, files.values())
        digest = content_hash(runner.directory)
        place = held.put(files)
    there = held.put(artifact_files(artifact))
    held.write(JOB, job.model_copy(update={"directory": there}).model_dump_json())
    started = time.monotonic()
    try:
        done = held.run(runner.started(place, JOB, RESULT), seconds)
    except TimeoutError:
        raise InputError(
            f"device {before.serial}: runner: no end after {seconds:g} s; it was stopped"
        ) from None
    took = time.monotonic() - started
    result = _result(held, job, done)
    return Ran(result, before, facts(held.device), digest, took)


def run_all(
    jobs: Mapping[Device, Job],
    artifact: Artifact,
    runners: Mapping[Device, JobRunner],
    seconds: float,
) -> dict[Device, Ran | InputError]:
    """Run a job on each of several devices at once.

    Returns:
        What each answered, or why it did not.
    """

    def one(device: Device, job: Job) -> Ran | InputError:
        try:
            with session(device) as held:
                return run_job(held, job, artifact, runners[device], seconds)
        except InputError as error:
            return error

    with ThreadPoolExecutor(max(1, len(jobs))) as pool:
        return dict(zip(jobs, pool.map(one, jobs, jobs.values()), strict=True))


def _tree(directory: Path) -> dict[str, Path]:
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path for path in paths}


def _hash_there(held: Session, program: str) -> str:
    done = held.device.script('sha256sum "$1"', program, seconds=60)
    if done.code:
        raise InputError(f"device {held.device.serial}: {program}: {_FAULTS[127]}")
    if re.match(r"[0-9a-f]{64}\s", done.out) is None:
        raise InputError(
            f"device {held.device.serial}: sha256sum: found {shown(done.out)}, expected a hash"
        )
    return done.out.split()[0]


def _result(held: Session, job: Job, done: Completed) -> Result:
    """What a runner wrote, checked."""
    name = f"device {held.device.serial}: runner"
    if done.code:
        said = done.err.strip().splitlines()
        why = _FAULTS.get(done.code, f"exit code {done.code}")
        raise InputError(f"{name}: {why}{f': {said[-1][:300]}' if said else ''}")
    text = held.read(RESULT)
    if text is None:
        raise InputError(f"{name}: ended well but wrote no {RESULT}")
    try:
        result = Result.model_validate_json(text, strict=True)
    except ValidationError as error:
        problem = first_problem(error).removeprefix("the file: ")
        raise InputError(f"{name}: {RESULT}: {problem}") from None
    parse_json(text, f"{name}: {RESULT}", unique=True)
    check_result(result, job, f"{name}: {RESULT}")
    return result
