"""Starts, asks and ends a worker process (``caliport.validation.latency.worker``)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from caliport.core.errors import InputError

_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


class Child:
    """A worker, from its start to its end; end it with ``stop`` or use it as a context.

    Should this process be killed, the worker ends too, since it finds no more lines.

    Args:
        what: Names it in errors, such as an artifact's directory.
        job: Its first line.
        threads: Of its libraries' pools.

    Attributes:
        ready: What it answers when it is ready for turns.

    Raises:
        InputError: It cannot do the job, or ended; its process is gone then.
    """

    def __init__(self, what: str, job: Mapping[str, Any], threads: int) -> None:
        self._what = what
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by stop
        pools = {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "caliport.validation.latency.worker"],
            env={**os.environ, **pools},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            self.ready = self._ask(json.dumps(job))
        except BaseException:
            self.stop()
            raise

    def turn(self) -> dict[str, Any]:
        """Let it have a turn; its answer."""
        return self._ask("go")

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer says more
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        text = self._process.stdout.readline()
        if not text:
            raise InputError(f"{self._what}: {self._end()}")
        answer: dict[str, Any] = json.loads(text)
        if "error" in answer:
            raise InputError(answer["error"])
        return answer

    def _end(self) -> str:
        """How the process ended and the last it said, in one line."""
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").splitlines()
        last = next((line.strip() for line in reversed(said) if line.strip()), "nothing was said")
        return f"its process ended while it was measured ({how}; {last[:200]})"


def cores_for(threads: int) -> tuple[int, ...]:
    """As many cores as threads to pin a process to, hyper-threads of one core apart if possible.

    Empty where the system has no way to (macOS), or this process may use fewer.
    """
    if not hasattr(os, "sched_setaffinity"):
        return ()
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < threads:
        return ()
    seen: list[str] = []
    ranked = []
    for core in allowed:
        path = Path(_TOPOLOGY.format(core))
        siblings = path.read_text() if path.is_file() else str(core)
        ranked.append((seen.count(siblings), core))
        seen.append(siblings)
    return tuple(sorted(core for _, core in sorted(ranked)[:threads]))
