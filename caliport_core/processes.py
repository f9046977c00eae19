"""Which of the launched processes this one is, from what the launcher put into the environment.

``torchrun`` and ``accelerate launch`` set RANK and WORLD_SIZE; mpirun's names are those that
accelerate reads. Asking the environment costs nothing, so a command line can ask before it
imports torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_POLL_SECONDS = 0.5


def process_count() -> int:
    """Processes that were launched together; 1 without a launcher."""
    return _first(_WORLD, 1)


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return process_count() == 1 or _first(_RANK, 0) == 0


def _first(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[n]) for n in names if os.environ.get(n, "").isdigit()), default)


def wait_until(done: Callable[[], bool]) -> None:
    """Wait for something that another process does, for as long as it takes.

    A poll and no collective, whose time-out would end a wait of half an hour. If the other process
    fails, the launcher ends this one.
    """
    while not done():
        time.sleep(_POLL_SECONDS)
