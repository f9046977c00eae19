"""Processes: launched ones, signals that end them, and one at a time for an output.

``torchrun`` and ``accelerate launch`` set RANK and WORLD_SIZE; for mpirun, the same variables are
read as accelerate reads. This needs no torch, so the command line can ask before importing it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import NoReturn

from caliport.core.errors import InputError

_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_POLL_SECONDS = 0.5
_LOCK = ".caliport-lock"
_TRIES = 100  # of a lock whose file others remove at the same moment
_HELD: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


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


@contextmanager
def alone(out: Path, inside: bool = False, wait: bool = False) -> Iterator[None]:
    """Let no other process, and no other thread, write an output while the body runs.

    An empty hidden file beside ``out`` is locked, and removed at the end. A lock ends with its
    process, so the file that a killed one leaves does no harm. Within the body, ``out`` may be
    locked again. Where there can be no lock (a read-only directory, a file system without locks),
    nothing is refused.

    Args:
        out: A file or directory that need not exist.
        inside: The lock is in the directory ``out``, whose parent need not be writable.
        wait: Wait for another process or thread that has the lock.

    Raises:
        InputError: Another process or thread has the lock, and ``wait`` is False.
    """
    lock = out.resolve() / _LOCK if inside else out.parent.resolve() / f".{out.name}{_LOCK}"
    if lock in _HELD.get():
        yield
        return
    absent = [place for place in lock.parents if not place.exists()]
    file = _locked(lock, out, wait)
    token = _HELD.set(_HELD.get() | {lock})
    try:
        yield
    finally:
        _HELD.reset(token)
        if file is not None:
            with suppress(OSError):
                if os.fstat(file).st_size == 0 and _is(lock, file):
                    lock.unlink()
            os.close(file)
        for directory in absent:  # of those made for the lock, what has stayed empty
            with suppress(OSError):
                directory.rmdir()


def _locked(lock: Path, out: Path, wait: bool) -> int | None:
    """The open file that this thread has locked; None where there can be no lock."""
    for _ in range(_TRIES):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except FileNotFoundError:
            continue  # another process has just removed the directory, which was empty
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(file)
            raise InputError(
                f"{out}: another caliport process is writing it; wait for its end, or name another "
                "place"
            ) from None
        except OSError:
            os.close(file)
            return None
        if _is(lock, file):
            return file
        os.close(file)  # whoever had the lock has removed the file
    return None


def _is(path: Path, file: int) -> bool:
    """Whether an open file is the regular one that a path names."""
    found = os.fstat(file)
    try:
        return stat.S_ISREG(found.st_mode) and os.path.samestat(path.lstat(), found)
    except FileNotFoundError:
        return False
