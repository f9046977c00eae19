"""Rank and number of launched processes, read from the launcher's environment variables.

``torchrun`` and ``accelerate launch`` set RANK and WORLD_SIZE; for mpirun, the same variables are
read as accelerate reads. This needs no torch, so the command line can ask before importing it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

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
