"""Commands as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "COLUMNS": "200",
    "OMP_NUM_THREADS": "1",  # as in tests/conftest.py
}


def caliport(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """``caliport`` in a process of its own, from a directory, its output kept."""
    command = [sys.executable, "-m", "caliport", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, text=True, capture_output=True)
