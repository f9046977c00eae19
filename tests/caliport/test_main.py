"""How a command ends where its reader, its terminal or a library does not go on."""

from __future__ import annotations

import errno
import os
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


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "?", "/a/b"), "/a/b: No space left on device"),
        (OSError(errno.EIO, "?"), "output: Input/output error"),
        (NotADirectoryError(errno.ENOTDIR, "?", "/a\n/b"), "/a /b: Not a directory"),
        (OSError(errno.EMFILE, "?", "x"), "x: Too many open files"),
        (Exception("No space left on device (os error 28)"), "output: No space left on device"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory"), "; set TMPDIR to a "),
        (FileNotFoundError(errno.ENOENT, "?", "/a"), "internal error: FileNotFoundError"),
        (ValueError("ours"), "internal error: ValueError: ours"),
    ],
)
def test_errors_of_the_system(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise error

    assert guarded(fails, "", False) == (3 if "internal" in said else 2)
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.startswith("caliport: ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("shell", ["2>/dev/full", "2>&-", ">/dev/full", ">&- 2>&-"])
def test_output_that_cannot_be_written(shell: str, tmp_path: Path) -> None:
    """The exit code is right also where nobody reads the line."""
    runs.write_run(tmp_path / "run", *runs.run_of())
    for command, code in (("report gone", 2), ("report run", 2 if shell == ">/dev/full" else 0)):
        line = f"{sys.executable} -P -m caliport {command} {shell}"
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=ENVIRONMENT, check=False)
        assert done.returncode == code


BARE = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ENVIRONMENT["PYTHONPATH"], "TMPDIR": "/nowhere"}


@pytest.mark.parametrize("settings", ["text", "bytes", "pipe", "device"])
def test_a_report_in_a_strangers_directory_without_home_and_terminal(
    settings: str, tmp_path: Path
) -> None:
    """matplotlib would read a file of the current directory, and fail or wait for ever."""
    pages = []
    for name in ("plain", settings):
        here = tmp_path / name
        runs.write_run(here / "run", *runs.run_of())
        theirs = here / "matplotlibrc"
        if name == "text":
            theirs.write_text("lines.linewidth: 30\nsvg.fonttype: path\nfont.size: nonsense\n")
        elif name == "bytes":
            theirs.write_bytes(b"\xff\xfe\0")
        elif name == "pipe":
            os.mkfifo(theirs)
        elif name == "device":
            theirs.symlink_to("/dev/zero")
        done = subprocess.run(
            [sys.executable, "-m", "caliport", "report", "run"],
            cwd=here,
            env={**BARE, "LANG": "C", "TERM": "dumb"},
            stdin=subprocess.DEVNULL,
            text=True,
            capture_output=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        pages.append((here / "run" / "reports" / "report.html").read_bytes())
        assert sorted(path.name for path in here.iterdir() if path != theirs) == ["run"]
    assert pages[0] == pages[1]


def test_without_any_home_nothing_is_kept_in_the_current_directory(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.path.expanduser = lambda path: path\n"
        "sys.argv[1:] = ['report', 'gone']\n"
        "from caliport.cli.main import main\n"
        "try: main()\n"
        "finally: print(os.environ['HOME'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=BARE,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.stdout == "/nonexistent\n"
