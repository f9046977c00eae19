"""Measure wall time and peak memory of a command and its descendants."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from caliport.core.errors import InputError

_INTERVAL = 0.1
_TAIL = 2000


@dataclass(frozen=True)
class Usage:
    """Wall time in seconds, and peak resident bytes of all processes of a command."""

    seconds: float
    peak_bytes: int


def measured(
    command: Sequence[str],
    log: Path,
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Usage:
    """Run a command to its end and measure it.

    Memory is read ten times a second from ``/proc``: the resident memory of all processes of the
    tree together, and the kernel's peak of each process (``VmHWM``), which cannot be missed between
    readings. The largest value is the peak. Mapped file pages count while they are resident.

    Args:
        command: Program and arguments.
        log: File for its output.
        cwd: Directory to run in.
        environment: All of its environment variables; default those of this process.

    Raises:
        InputError: It failed; the message contains the end of its output.
    """
    start = time.perf_counter()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            list(command), stdout=stream, stderr=subprocess.STDOUT, cwd=cwd, env=environment
        )
        watch = _Watch(process.pid)
        try:
            code = process.wait()
        finally:
            process.kill()  # if this process is interrupted
            seconds = time.perf_counter() - start
            peak = watch.stop()
    if code:
        tail = log.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
        raise InputError(f"{' '.join(command[:4])} … ended with {code}; the end of {log}:\n{tail}")
    return Usage(seconds, peak)


class _Watch(threading.Thread):
    """Reads the memory of a process and its descendants until it is stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._peak = 0
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        """Record the highest reading."""
        while not self._over.wait(_INTERVAL):
            readings = [_memory(pid) for pid in _tree(self._pid)]
            together = sum(now for now, _ in readings)
            self._peak = max([self._peak, together, *(most for _, most in readings)])

    def stop(self) -> int:
        """The peak in bytes."""
        self._over.set()
        self.join()
        return self._peak


def _tree(pid: int) -> list[int]:
    """The process and all its descendants."""
    import psutil

    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _memory(pid: int) -> tuple[int, int]:
    """Current and peak resident bytes of a process; zeros once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in lines if line.startswith(("VmRSS:", "VmHWM:")))
    now, most = (int(fields.get(name, "0").split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most
