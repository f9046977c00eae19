"""Launched processes: rank and number from the launcher's environment; signals that end them.

``torchrun`` and ``accelerate launch`` set RANK and WORLD_SIZE; for mpirun, the same variables are
read as accelerate reads. This needs no torch, so the command line can ask before importing it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_POLL_SECONDS = 0.5


def process_count() -> int:
    """Number of processes launched together; 1 without a launcher."""
    return _first(_WORLD, 1)


def is_main() -> bool:
    """Whether this is the process that writes files and prints messages."""
    return process_count() == 1 or _first(_RANK, 0) == 0


def _first(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[n]) for n in names if os.environ.get(n, "").isdigit()), default)


def wait_until(done: Callable[[], bool]) -> None:
    """Poll until another process has done something, for as long as it takes.

    This polls because a collective would time out after half an hour. If the other process fails,
    the launcher ends this one.
    """
    while not done():
        time.sleep(_POLL_SECONDS)


SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a command as Ctrl-C does, once ``end_on_signals`` was called."""
_seen: list[int] = []


def end_on_signals() -> None:
    """Raise KeyboardInterrupt on SIGTERM and SIGHUP, so that what was begun is removed.

    Only the first one counts: removing goes on. What ``nohup`` ignores stays ignored.
    """
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _interrupt)


def note_signal(number: int) -> None:
    """Remember which signal ends this process."""
    _seen.append(number)


def interrupted_code() -> int:
    """Exit code of an interrupted process: 128 and the signal's number, 130 for Ctrl-C."""
    return 128 + (_seen[0] if _seen else signal.SIGINT)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    note_signal(number)
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt
