"""A training on several processes: the same values, exact resume, and no one is left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import ENVIRONMENT
from comparing import assert_same, losses

from tests.sampling import thorough

LAUNCHED = """
    import json, sys, torch
    from pathlib import Path
    from caliport.calibrate.training import loop
    from caliport.calibrate.training.batches import Encoded
    from caliport.calibrate.training.flix import FeatureSet, FeatureSettings, train_features
    from caliport.calibrate.training.lora import LoraSettings, train_lora
    from caliport.calibrate.training.loop import TrainRun, TrainSettings
    from caliport.core.checkpoints import load_base
    from caliport.core.processes import is_main, process_count

    def examples():
        return [Encoded((5 + i, 6 + i), (7 + i, *range(8, 8 + i % 3), 2)) for i in range(64)]

    def featured(base, steps, batch):
        pool = examples()
        sets = [FeatureSet(("often",), pool[:56]), FeatureSet(("often", "seldom"), pool[56:])]
        features, curve = train_features(
            load_base(base), sets, FeatureSettings({"often": 2, "seldom": 2}, dropout=0.3),
            TrainRun(TrainSettings(steps, batch, learning_rate=1e-3), "x"),
        )
        named = [(f"{f} {n}", u, n) for f, u in features.items() for n in u.modules]
        sides = {s: {key: getattr(u, s)[n] for key, u, n in named} for s in ("a", "b")}
        return {**sides, "curve": curve, "processes": process_count()}

    def trained(base, out, steps, batch, dropout=0.0, micro_batch=None, fails=None):
        loop._CHECKPOINT_SECONDS = -1.0
        collate, rank, calls = loop.collate, 0 if is_main() else 1, []
        def failing(*arguments):
            calls.append(arguments)
            if rank == fails and len(calls) == 3:
                raise ValueError(f"process {rank} of {process_count()} fails")
            return collate(*arguments)
        loop.collate = failing
        update, curve = train_lora(
            load_base(base), examples(), LoraSettings(4, 8, dropout),
            TrainRun(
                TrainSettings(steps, batch, learning_rate=1e-3), "x",
                out.with_suffix(".resume"), micro_batch,
            ),
        )
        loop.collate = collate
        found = {"a": dict(update.a), "b": dict(update.b), "curve": curve}
        return {**found, "processes": process_count()}

    if __name__ == "__main__":
        torch.set_num_threads(1)
        base, *cases = sys.argv[1:]
        for case in map(json.loads, cases):
            out = Path(case.pop("out"))
            featuring = case.pop("features", False)
            found = featured(base, **case) if featuring else trained(base, out, **case)
            if is_main():
                torch.save(found, out)
"""

ALONE = ()
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")


def launched(launcher: Sequence[str], base: Path, *cases: dict[str, Any]) -> subprocess.Popen[str]:
    """Trainings one after another on one CPU process or two, each found in its file ``out``."""
    script = Path(cases[0]["out"]).with_suffix(".py")
    script.write_text(textwrap.dedent(LAUNCHED))
    command = [sys.executable, *(("-m", *launcher) if launcher else ()), str(script), str(base)]
    return subprocess.Popen(
        [*command, *(json.dumps({**case, "out": str(case["out"])}) for case in cases)],
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen[str], out: Path) -> dict[str, Any]:
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    found: dict[str, Any] = torch.load(out, weights_only=True)
    return found


@pytest.mark.slow
def test_two_processes_give_what_one_gives(base_dir: Path, tmp_path: Path) -> None:
    """The same batches cut into parts of at most 3; with one example a process has none.

    With features that few examples have: where none of a batch has one, it stays as it is.
    """
    cases: list[dict[str, Any]] = [
        {"steps": 10, "batch": 9, "micro_batch": 3},
        {"steps": 10, "batch": 1},
        {"steps": 10, "batch": 4, "features": True},
    ]
    found = []
    for launcher in (ALONE, ACCELERATE):
        outs = [tmp_path / f"{len(launcher)}-{index}" for index in range(len(cases))]
        result(launched(launcher, base_dir, *map(_into, cases, outs)), outs[0])
        found.append([torch.load(out, weights_only=True) for out in outs])
    for one, two in zip(*found, strict=True):
        assert (one["processes"], two["processes"]) == (1, 2)
        assert losses(one["curve"]) == pytest.approx(losses(two["curve"]), rel=1e-5)
        assert_same(one["a"], two["a"])
        assert_same(one["b"], two["b"])


def _into(case: dict[str, Any], out: Path) -> dict[str, Any]:
    return {**case, "out": out}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [thorough(ALONE, name="alone"), TORCHRUN])
def test_killed_training_resumes_exactly(
    launcher: Sequence[str], base_dir: Path, tmp_path: Path
) -> None:
    """Killed without warning and started again, it ends with the same bits, dropout and all."""
    case = {"steps": 60, "batch": 8, "dropout": 0.1}
    out, resume = tmp_path / "killed", tmp_path / "killed.resume"
    process = launched(launcher, base_dir, {"out": out, **case})
    while not resume.exists():
        assert process.poll() is None, "ended before its first checkpoint"
    parent = psutil.Process(process.pid)
    for one in (parent, *parent.children()):
        one.kill()
    process.communicate()
    assert not out.exists()
    state = torch.load(resume, weights_only=True)
    assert state["step"] < 60
    assert len(state["rng"]) == (2 if launcher else 1)
    again = launched(launcher, base_dir, {"out": out, **case}, {"out": tmp_path / "whole", **case})
    whole, resumed = result(again, tmp_path / "whole"), torch.load(out, weights_only=True)
    assert whole["curve"] == resumed["curve"]
    assert_same(whole["b"], resumed["b"], tolerance=0)


@pytest.mark.slow
def test_one_process_that_fails_ends_all(base_dir: Path, tmp_path: Path) -> None:
    case = {"out": tmp_path / "out", "steps": 10, "batch": 9, "fails": 1}
    process = launched(TORCHRUN, base_dir, case)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "process 1 of 2 fails" in said
    assert not (tmp_path / "out").exists()
    assert torch.load(tmp_path / "out.resume", weights_only=True)["step"] >= 1


@pytest.mark.slow
def test_two_processes_weigh_a_merge_without_a_training_before_it(
    base_dir: Path, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    """It hung: one of them waited for the other, which waited for the directory."""
    (tmp_path / "data.jsonl").write_text('{"input": "Anna", "output": "Tom"}\n' * 12)
    flags = ["--base", base_dir, "--data", "data.jsonl"]
    flags += [flag for path in adapter_dirs for flag in ("--adapter", path)]
    for method, more in (("lm-cocktail", ()), ("exact", ("--weight", "search"))):
        command = [sys.executable, "-m", *TORCHRUN, "-m", "caliport", "calibrate", *flags, *more]
        done = subprocess.run(
            [*map(str, command), "--method", method, "--out", method],
            cwd=tmp_path,
            env={**ENVIRONMENT, "MASTER_PORT": "0"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / method / "adapter_model.safetensors").is_file()
