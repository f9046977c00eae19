"""Runs a ``Job`` on ExecuTorch.

    python -m caliport.android_harness.runners.executorch_python job.json result.json

A runner for Linux devices: ExecuTorch's C++ through its Python binding. It says so in its result.
"""

from __future__ import annotations

import os
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from caliport.android_harness.runners.executorch import PYTHON
from caliport.android_harness.runners.job import Job, Result, Timing, Turn
from caliport.android_harness.runners.kinds import answers
from caliport.core.errors import InputError
from caliport.core.places import replacing
from caliport.export import runtime as runtimes
from caliport.export.artifact import Artifact
from caliport.validation.latency.worker import memory
from caliport.validation.records.record import read_record
from caliport.validation.runners.executorch import NAME as RUNTIME

if TYPE_CHECKING:
    from caliport.validation.runners.runner import Runner

NAME = f"{PYTHON} 1"
_PLAIN_IDS = 256  # every vocabulary has these


def read_job(path: Path) -> Job:
    """A job for ExecuTorch from its file.

    Raises:
        InputError: See ``read_record``, or a job for another runtime.
    """
    job = read_record(Job, path)
    if job.runtime != RUNTIME:
        raise InputError(f"{path}: runtime: found {job.runtime}, expected {RUNTIME}")
    return job


def run_job(job: Job) -> Result:
    """Load what the job names, answer and time it.

    Raises:
        InputError: Cores that cannot be had, an artifact that cannot be run, or a prompt that it
            refuses.
    """
    if job.cores:
        _stay_on(job.cores)
    from caliport.validation.runners.executorch import BASE_METHOD, ExecuTorchRunner, binding

    artifact = Artifact.read(job.directory)
    binding()
    artifact.check()  # reads every file, so that all are in the page cache
    idle = _peak_bytes()
    start = time.perf_counter()
    runner = ExecuTorchRunner(artifact.directory, job.threads, job.adapter or BASE_METHOD)
    load = time.perf_counter() - start
    loaded = _peak_bytes()
    said = answers(runner, job)
    timed = () if job.timing is None else _turns(runner, job.timing)
    return Result(
        runner=NAME,
        runtime_version=metadata.version(runtimes.get(RUNTIME).package),
        threads=runner.threads,
        cores=tuple(sorted(os.sched_getaffinity(0))),
        load_seconds=load,
        peak_bytes=_peak_bytes(),
        loaded_bytes=loaded,
        idle_bytes=idle,
        answers=said,
        turns=timed,
    )


def _turns(runner: Runner, timing: Timing) -> tuple[Turn, ...]:
    found = []
    for i in range(-timing.warmup, timing.repetitions):
        for length in timing.prompt_lengths:
            one = _turn(runner, length, timing.new_tokens)
            if i >= 0:
                found.append(one)
    return tuple(found)


def _turn(runner: Runner, length: int, new_tokens: int) -> Turn:
    prompt = [i % _PLAIN_IDS for i in range(length)]
    start = time.perf_counter()
    token = int(runner.prefill(prompt).argmax())
    first = time.perf_counter() - start
    steps = []
    for _ in range(new_tokens - 1):
        start = time.perf_counter()
        token = int(runner.step(token).argmax())
        steps.append(time.perf_counter() - start)
    return Turn(prompt_tokens=length, first_token_seconds=first, step_seconds=tuple(steps))


def _stay_on(cores: tuple[int, ...]) -> None:
    try:
        os.sched_setaffinity(0, cores)
    except OSError:
        held: set[int] = set()
    else:
        held = os.sched_getaffinity(0)
    if missing := sorted(set(cores) - held):
        raise InputError(f"cores: found {missing[0]}, expected cores that are there and online")


def _peak_bytes() -> int:
    peak = memory()[1]
    assert peak is not None
    return peak


def main() -> int:
    """Read the job, run it and write its result whole; the exit code."""
    if len(sys.argv) != 3:
        print(f"{NAME}: {len(sys.argv) - 1} arguments, expected JOB RESULT", file=sys.stderr)
        return 2
    place = Path(sys.argv[2])
    try:
        result = run_job(read_job(Path(sys.argv[1])))
        with replacing(place) as beside:
            beside.write_text(result.model_dump_json() + "\n", encoding="utf-8")
    except (InputError, OSError) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
