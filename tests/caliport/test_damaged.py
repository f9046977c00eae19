"""What was damaged in a run is made again; what is not caliport's is never removed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from caliport.core.directories import MANIFEST, content_hash
from caliport.core.errors import InputError
from caliport.core.outputs import within_run
from caliport.stages.stage import stage

DAMAGES: dict[str, Callable[[Path], object]] = {
    "other bytes": lambda out: (out / "weights").write_bytes(b"b" * 2_000_000),
    "cut": lambda out: (out / "weights").write_bytes(b"a" * 1000),
    "gone": lambda out: (out / "weights").unlink(),
    "a cut manifest": lambda out: (out / MANIFEST).write_text('{"stage": "s"'),
    "an empty manifest": lambda out: (out / MANIFEST).write_text(""),
    "no manifest": lambda out: (out / MANIFEST).unlink(),
}


def make(out: Path, inputs: Mapping[str, Path] | None = None) -> int:
    """Run a stage; how often it built."""
    built = []

    def build(partial: Path, extra: dict, resume: Path) -> None:
        built.append(partial)
        (partial / "weights").write_bytes(b"a" * 2_000_000)

    stage(out, "s", "title", inputs or {}, {}, build)
    return len(built)


@pytest.mark.parametrize(("name", "damage"), DAMAGES.items(), ids=DAMAGES)
def test_a_damaged_stage_of_a_run_is_made_again(
    name: str, damage: Callable[[Path], object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run" / "base"
    assert make(out) == 1
    whole = content_hash(out)
    damage(out)
    with within_run(tmp_path / "run"):
        assert make(out) == 1
        assert make(out) == 0
    assert content_hash(out) == whole
    kept = [path.name for path in out.parent.iterdir() if path.name != "base"]
    assert kept == (["base.kept-1"] if "manifest" in name else [])
    assert "made again" in capfd.readouterr().err


def test_a_directory_of_the_users_is_kept(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for place in (run / "base", tmp_path / "elsewhere"):
        place.mkdir(parents=True)
        (place / "notes").write_text("mine")
    with within_run(run):
        assert make(run / "base") == 1
        assert (run / "base.kept-1" / "notes").read_text() == "mine"
        (run / "base" / "notes").write_text("mine")
        with pytest.raises(InputError, match="notes: was not made by caliport"):
            make(run / "base")
        with pytest.raises(InputError, match="elsewhere: is not empty and was not made"):
            make(tmp_path / "elsewhere")
    assert (run / "base" / "notes").read_text() == "mine"
    with pytest.raises(InputError, match="kept-1: is not empty and was not made by caliport"):
        make(run / "base.kept-1")


def test_a_clock_decides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the past and of the future, after the clock was set back."""
    data, out = tmp_path / "data", tmp_path / "run" / "out"
    data.write_text("first")
    assert make(out, {"data": data}) == 1
    whole = content_hash(out)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    for age, text in ((0, "first"), (4_100_000_000, "first"), (0, "other"), (0, "third")):
        anew = data.read_text() != text
        data.write_text(text)
        for path in (data, out, *out.iterdir()):
            os.utime(path, (age, age))
        assert make(out, {"data": data}) == anew
        assert make(out, {"data": data}) == 0
    assert content_hash(out) == whole


@pytest.mark.parametrize("damage", ["empty", "junk", "cut", "flipped"])
def test_a_damaged_checkpoint_begins_anew(damage: str, tmp_path: Path) -> None:
    from accelerate import Accelerator

    from caliport.calibrate.training.checkpoint import State
    from caliport.calibrate.training.processes import random_state

    accelerator = Accelerator(cpu=True)
    state = State.new(nn.Linear(64, 64), 0.1, "constant", 0, 5)
    state.advance(1.0)
    path = tmp_path / "resume"
    state.save(path, accelerator, random_state(torch.device("cpu")))
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    contents = {"empty": b"", "junk": b"junk" * 1000, "cut": whole[:middle], "flipped": flipped}
    path.write_bytes(contents[damage])
    other = State.new(nn.Linear(64, 64), 0.1, "constant", 0, 5)
    other.load(path, accelerator, "lc++")
    assert other.step == 0
    path.write_bytes(whole)
    other.load(path, accelerator, "lc++")
    assert other.step == 1
