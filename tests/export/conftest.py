"""Finished artifacts of both runtimes, made once by another process; other releases."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from commands import ENVIRONMENT

from caliport.core import patching
from caliport.core.errors import InputError
from tests.forking import forked

EXPORT = """
import sys
from caliport.cli.app import app
base, adapter, out = sys.argv[1:]
for runtime in ("onnx", "executorch"):
    flags = ["--base", base, "--adapter", adapter, "--runtime", runtime, "--precision", "int8"]
    app(["export", *flags, "--context", "96", "--out", f"{out}/{runtime}"], standalone_mode=False)
"""


def export_both(base: Path, adapter: Path, out: Path, seed: int) -> Path:
    """``out/onnx`` and ``out/executorch``, from a process whose hashes are seeded by ``seed``."""
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, base, adapter, out],
        env={**ENVIRONMENT, "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert os.listdir(out)
    return out


@pytest.fixture(scope="session")
def artifacts(
    base_dir: Path, adapter_dirs: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A directory with the composition as ``onnx`` and as ``executorch``, in int8."""
    out = tmp_path_factory.mktemp("artifacts")
    done = forked(base_dir, adapter_dirs[0], out, cwd=out, code=EXPORT)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def another(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that other releases of packages are installed, such as ``torch="2.14.0"``."""
    installed = patching.installed

    def pretend(**versions: str) -> None:
        monkeypatch.setattr(patching, "installed", lambda p: versions.get(p) or installed(p))

    return pretend


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Check that something refuses a release, in one line, and takes the installed one."""
    installed = patching.installed

    def check(enter: Callable[[], AbstractContextManager[None] | object], **other: str) -> None:
        ((package, version),) = other.items()
        with monkeypatch.context() as patch:
            patch.setattr(patching, "installed", lambda p: other.get(p) or installed(p))
            with pytest.raises(InputError, match=f"{package}: found version {version}") as info:
                _enter(enter())
        assert "\n" not in str(info.value)

    return check


def _enter(context: object) -> None:
    if isinstance(context, AbstractContextManager):
        with context:
            pass
