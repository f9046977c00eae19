"""A virtual environment for each peer, since peers pin versions that conflict with ours."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.export.exporters import EXPORTERS, interpreter
from caliport.core.errors import InputError

_READY = "ready.json"
_VERSIONS = """
import json, sys
from importlib import metadata
print(json.dumps({name: metadata.version(name) for name in sys.argv[1:]}))
"""


def install(name: str, peers: Path) -> bool:
    """Create a peer's environment with pip, unless it is finished.

    Args:
        name: One of ``EXPORTERS``.
        peers: The directory of all environments.

    Returns:
        Whether anything was installed.

    Raises:
        InputError: pip failed.
    """
    steps = [list(step) for step in EXPORTERS[name].installs]
    home = peers / name
    ready = home / _READY
    if not steps or (ready.is_file() and json.loads(ready.read_text(encoding="utf-8")) == steps):
        return False
    ready.unlink(missing_ok=True)
    _run([sys.executable, "-P", "-m", "venv", "--clear", str(home)], name)
    for step in steps:
        _run([interpreter(name, peers), "-P", "-m", "pip", "install", "--quiet", *step], name)
    ready.write_text(json.dumps(steps, indent=2) + "\n", encoding="utf-8")
    return True


def check_installed(names: Sequence[str], peers: Path) -> None:
    """Check that every peer of ``names`` has its environment.

    Raises:
        InputError: An environment is missing.
    """
    missing = [
        name for name in names if EXPORTERS[name].installs and not (peers / name / _READY).is_file()
    ]
    if missing:
        raise InputError(
            f"{peers}: no environment for {', '.join(missing)}; create them with `python -m "
            "benchmarks.export setup`"
        )


def installed(name: str, peers: Path) -> dict[str, str]:
    """Versions of an exporter's packages that the tables show."""
    command = [interpreter(name, peers), "-P", "-c", _VERSIONS, *EXPORTERS[name].shown]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _run(command: list[str], name: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{name}: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
