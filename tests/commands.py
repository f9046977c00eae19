"""Commands as a user runs them."""

from __future__ import annotations

import os
import shutil
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


IN_NAMESPACE = ["unshare", "--map-root-user", "--mount"]
"""Starts a command that may mount disks, which nobody else sees."""


def can_mount() -> bool:
    """Whether this machine allows ``IN_NAMESPACE``."""
    if shutil.which("unshare") is None:
        return False
    probe = [*IN_NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0
