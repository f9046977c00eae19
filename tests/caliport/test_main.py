"""How a command ends where its reader, its terminal or a library does not go on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from caliport.cli.main import guarded
from tests.commands import ENVIRONMENT
from tests.validation import runs


class Panic(BaseException):
    """As pyo3's ``PanicException``: no ``Exception``."""


def test_a_panic_is_an_internal_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Not exit code 1, which says that a gate failed."""

    def panics() -> None:
        raise Panic("called `Option::unwrap()`\non a `None` value")

    assert guarded(panics, "", False) == 3
    said = capsys.readouterr().err
    assert said.startswith("caliport: internal error: Panic: called")
    assert said.count("\n") == 1


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    runs.write_run(tmp_path / "run", *runs.run_of())
    command = f"{sys.executable} -P -m caliport report run | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True
    )
    assert done.returncode == 141, done.stderr
    assert done.stderr == ""


def test_an_ascii_terminal_shows_what_it_can(tmp_path: Path) -> None:
    runs.write_run(tmp_path / "run", *runs.run_of())
    ascii_only = {**ENVIRONMENT, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "caliport", "report", "run"],
        cwd=tmp_path,
        env=ascii_only,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
