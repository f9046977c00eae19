"""A separate process that does one thing, again and again, and reports how long it took.

It reads lines of JSON and answers each with one: first the job, then anything, for a turn.
An error that a user can fix is answered as ``{"error": ...}``, and the process ends, as it does
when there are no more lines. Nothing heavy is imported before the process is pinned to its cores,
since libraries make their threads when they are imported.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

_TURN = 0.2  # seconds; a turn is one answer, or as many as it takes to fill this


class Work(Protocol):
    """What a worker does.

    Attributes:
        ready: What it says when it is ready for turns.
    """

    ready: dict[str, Any]

    def turn(self) -> dict[str, Any]:
        """Do it once more."""
        ...


class Decoding:
    """Answers a prompt with a fixed number of tokens, greedily, ends ignored.

    ``ready`` has ``load`` in seconds, and the ``idle`` and ``load_peak`` memory. A turn has
    ``answers``: seconds to each token, of one answer or several; and ``peak`` and ``resident``
    memory in bytes, None where the system does not tell.

    The clock includes our runner's own work on each token (an argmax and a copy of the logits), as
    any caller's would.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        from caliport.export.artifact import Artifact
        from caliport.validation.runners import engine
        from caliport.validation.runners.engine import PLAIN

        artifact = Artifact.read(job["directory"])
        self._prompt, self._new_tokens = job["prompt"], job["new_tokens"]
        runtime = engine.get(artifact.runtime)
        runtime.preload()
        artifact.check()  # reads every file, so that all are in the page cache
        idle = memory()[0]
        start = time.perf_counter()
        self._runner = runtime.open(artifact, job["threads"], job["composition"], PLAIN)
        self._runner.prefill(self._prompt[:1])
        load = time.perf_counter() - start
        self.ready = {"load": load, "idle": idle, "load_peak": memory()[1]}
        self._answer()

    def turn(self) -> dict[str, Any]:
        """Answer at least once, after a prefill that wakes threads and caches."""
        self._runner.prefill(self._prompt)
        answers: list[list[float]] = []
        gc.disable()
        start = time.perf_counter()
        while not answers or time.perf_counter() - start < _TURN:
            answers.append(self._answer())
        gc.enable()
        resident, peak = memory()
        return {"answers": answers, "resident": resident, "peak": peak}

    def _answer(self) -> list[float]:
        times = []
        start = time.perf_counter()
        token = int(self._runner.prefill(self._prompt).argmax())
        for _ in range(self._new_tokens - 1):
            times.append(time.perf_counter())
            token = int(self._runner.step(token).argmax())
        times.append(time.perf_counter())
        return [later - earlier for earlier, later in pairwise([start, *times])]


class MemoryReading:
    """Reads memory: ``ready`` has the ``size`` in bytes, a turn ``passes`` in seconds."""

    def __init__(self, job: dict[str, Any]) -> None:
        from caliport.validation.latency.bandwidth import Reading

        self._reading = Reading(job["threads"], job["available"])
        self._reading.passes()
        self.ready = {"size": self._reading.size}

    def turn(self) -> dict[str, Any]:
        """A few passes."""
        return {"passes": self._reading.passes()}


_KINDS: dict[str, type[Decoding] | type[MemoryReading]] = {
    "artifact": Decoding,
    "memory": MemoryReading,
}


def memory() -> tuple[int | None, int | None]:
    """Resident bytes of this process, now and at their highest.

    The kernel's ``VmHWM`` where there is ``/proc``: ``ru_maxrss`` would be that of the process that
    this one was forked from, if it was larger.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="utf-8").splitlines()
        fields = dict(line.split(":", 1) for line in lines if line.startswith("Vm"))
        return int(fields["VmRSS"].split()[0]) << 10, int(fields["VmHWM"].split()[0]) << 10
    import psutil

    info = psutil.Process().memory_info()
    return info.rss, getattr(info, "peak_wset", None)


def work() -> None:
    """Answer lines until there are no more.

    Runtimes print to the standard output too; so theirs becomes the standard error.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    if job["cores"]:
        os.sched_setaffinity(0, job["cores"])
    from caliport.core.errors import InputError

    try:
        found: Work = _KINDS[job["kind"]](job)
        print(json.dumps(found.ready), file=answers, flush=True)
        for _ in sys.stdin:
            print(json.dumps(found.turn()), file=answers, flush=True)
    except InputError as error:
        print(json.dumps({"error": str(error)}), file=answers, flush=True)


if __name__ == "__main__":
    work()
