"""Finished artifacts of both runtimes, made once by a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ENVIRONMENT

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
    return export_both(base_dir, adapter_dirs[0], out, seed=1)
