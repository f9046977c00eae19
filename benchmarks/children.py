"""Child processes of benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parents[1])
_RUN = (
    f"import runpy, sys; sys.path.insert(0, {_ROOT!r}); "
    "runpy.run_module({!r}, run_name='__main__', alter_sys=True)"
)


def child(module: str) -> list[str]:
    """The command that runs a module of ours, as ``-m`` does without the current directory."""
    return [sys.executable, "-P", "-c", _RUN.format(module)]
