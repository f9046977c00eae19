"""One process at a time writes an output; a lock leaves with its process, and nothing stays."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import caliport
from caliport.cli.main import app, guarded
from caliport.core import outputs
from caliport.core.errors import InputError
from caliport.core.outputs import new_directory
from caliport.core.processes import alone
from tests.commands import ENVIRONMENT, ROOT

BUSY = "another caliport process is writing it; wait for its end, or name another place"


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """As another process has it: a lock belongs to whoever opened the file."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
    lock.unlink()
    os.close(file)


def names(place: Path) -> list[str]:
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*"))


def test_nothing_stays_of_a_lock(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep" / "out"
    with alone(out), alone(out):
        assert names(tmp_path) == ["new", "new/deep", "new/deep/.out.caliport-lock"]
    assert names(tmp_path) == []
    with alone(out, inside=True):
        assert names(tmp_path)[-1] == "new/deep/out/.caliport-lock"
    assert names(tmp_path) == []
    with alone(out):
        (tmp_path / "new" / "file").touch()
    assert names(tmp_path) == ["new", "new/file"]


def test_an_output_is_written_by_one_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def make(content: str) -> None:
        with new_directory(out, "export", {}, {}) as (partial, _):
            (partial / "file").write_text(content)

    make("first")
    before = names(tmp_path)
    with locked(tmp_path / ".out.caliport-lock"), pytest.raises(InputError, match=BUSY):
        make("second")
    assert names(tmp_path) == before
    assert (out / "file").read_text() == "first"
    make("third")
    assert names(tmp_path) == before
    assert (out / "file").read_text() == "third"


HOLD = """
import sys, time
from pathlib import Path
from caliport.core.processes import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=BUSY), alone(out):
        pass
    holder.send_signal(signal.SIGKILL)
    with alone(out, wait=True):
        pass
    holder.wait()
    assert names(tmp_path) == []


def test_two_exports_into_one_place(
    one_layer: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second, which begins while the first works, is refused; the first is whole."""
    base, out, said = one_layer[0], tmp_path / "out", list[str]()
    begin = outputs._partial

    def second() -> None:
        try:
            caliport.export(base, out, runtime="onnx", precision="int8")
        except InputError as error:
            said.append(str(error))

    def beginning(*given: Any) -> Any:
        monkeypatch.undo()
        thread = Thread(target=second)
        thread.start()
        thread.join()
        return begin(*given)

    monkeypatch.setattr(outputs, "_partial", beginning)
    made = caliport.export(base, out, runtime="onnx", precision="fp32")
    assert said == [f"{out}: {BUSY}"]
    assert made.precision == "fp32"
    made.check()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_lock_of_ours_stays(tmp_path: Path) -> None:
    lock = tmp_path / ".out.caliport-lock"
    lock.write_text("mine")
    with alone(tmp_path / "out"):
        pass
    assert lock.read_text() == "mine"
    lock.unlink()
    for make in (lock.mkdir, lambda: os.mkfifo(lock), lambda: lock.symlink_to("nowhere")):
        make()
        with alone(tmp_path / "out"):
            pass
        assert os.path.lexists(lock)
        lock.rmdir() if lock.is_dir() else lock.unlink()
    with alone(Path("/proc/none/out")), alone(Path("/dev/null/out")):  # no place for a lock
        pass


@pytest.mark.parametrize("command", ["run", "calibrate", "export", "validate"])
def test_a_run_is_written_by_one_at_a_time(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [command, str(ROOT / "recipes" / "toy.yaml"), "--runs", str(tmp_path)]
    with locked(tmp_path / "toy" / ".caliport-lock"):
        assert guarded(lambda: app(call, standalone_mode=False), "", False) == 2
    assert capsys.readouterr().err == f"caliport: {tmp_path / 'toy'}: {BUSY}\n"
    assert names(tmp_path) == ["toy"]


def test_a_bundle_is_added_to_by_one_at_a_time(tmp_path: Path) -> None:
    from caliport.export.api import add_composition

    with locked(tmp_path / ".bundle.caliport-lock"), pytest.raises(InputError, match=BUSY):
        add_composition(tmp_path / "bundle", "name", tmp_path / "adapter")
