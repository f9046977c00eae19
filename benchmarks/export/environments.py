"""A virtual environment for each peer, since peers pin versions that conflict with ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
    steps = EXPORTERS[name].installs
    return bool(steps) and create(peers / name, steps)


def create(
    home: Path, steps: Sequence[Sequence[str]], environment: Mapping[str, str] | None = None
) -> bool:
    """Create a virtual environment with pip, unless it is finished.

    Args:
        home: Its directory.
        steps: Arguments of each ``pip install``, in order.
        environment: Variables for pip, such as ``CMAKE_ARGS``.

    Returns:
        Whether anything was installed.

    Raises:
        InputError: pip failed.
    """
    wanted = [list(step) for step in steps]
    ready = home / _READY
    if ready.is_file() and json.loads(ready.read_text(encoding="utf-8")) == wanted:
        return False
    ready.unlink(missing_ok=True)
    _run([sys.executable, "-P", "-m", "venv", "--clear", str(home)], home.name)
    python = str(home / "bin" / "python")
    for step in wanted:
        _run([python, "-P", "-m", "pip", "install", "--quiet", *step], home.name, environment)
    ready.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
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


def _run(command: list[str], name: str, environment: Mapping[str, str] | None = None) -> None:
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=variables)
    if done.returncode:
        raise InputError(f"{name}: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
