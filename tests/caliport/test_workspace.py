"""Stages when several processes run one recipe: who builds, who writes, who waits, who ends."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from commands import ENVIRONMENT
from safetensors.torch import load_file

from caliport.core.directories import content_hash, read_manifest
from tests.forking import forked

STAGES = """
    import os, sys, time
    from pathlib import Path
    from caliport.stages.stage import stage
    from caliport.core.errors import InputError
    place, fails, rank = Path(sys.argv[1]), sys.argv[2] == "fails", os.environ["RANK"]

    def build(name):
        def run(partial, extra, resume):
            with (place / "log").open("a") as log:
                log.write(f"{name} {rank}\\n")
            if name == "second" and fails:
                raise InputError("second: fails")
            if rank == "0":
                time.sleep(1.5)
            (partial / "rank").write_text(rank)
        return run

    for _ in range(2):
        stage(place / "first", "s", "first", {}, {}, build("first"))
        stage(place / "both", "s", "both", {"i": place / "first"}, {}, build("both"), together=True)
        stage(place / "second", "s", "second", {"i": place / "both"}, {}, build("second"))
    (place / f"end-{rank}").touch()
"""


def test_one_process_writes_and_all_train(tmp_path: Path) -> None:
    """The others wait for the main one, whose files appear; a second time all skip all."""
    script = textwrap.dedent(STAGES)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), ""],
            env={**ENVIRONMENT, "RANK": rank, "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sorted((tmp_path / "log").read_text().split("\n")[:-1]) == [
        "both 0",
        "both 1",
        "first 0",
        "second 0",
    ]
    for name in ("first", "both", "second"):
        assert (tmp_path / name / "rank").read_text() == "0"
        assert read_manifest(tmp_path / name)["stage"] == "s"
    assert said[0].count("done") == said[0].count("skipped") == 3
    assert said[1] == "", "only the main process speaks"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_main_process_that_fails_ends_those_that_wait(tmp_path: Path) -> None:
    (tmp_path / "stages.py").write_text(textwrap.dedent(STAGES))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    start = time.monotonic()
    done = subprocess.run(
        [*launch, "stages.py", str(tmp_path), "fails"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        timeout=200,
        text=True,
        capture_output=True,
    )
    assert done.returncode != 0
    assert "second: fails" in done.stderr
    assert time.monotonic() - start < 150
    assert not list(tmp_path.glob("end-*"))
    assert not (tmp_path / "second").exists()


RECIPE = """
name: tiny
data: {source: pocket, train: 96, validation: 12}
base:
  shape: {vocab_size: 400, hidden_size: 64, intermediate_size: 160, layers: 2, context: 320}
  train: {steps: 4, batch_size: 8, learning_rate: 1.0e-3, prompt_loss: true}
adapters: {summarize: , translate_es: }
lora: {rank: 4, alpha: 8, dropout: 0, train: {steps: 3, batch_size: 7, learning_rate: 1.0e-3}}
compositions: {summarize_es: [summarize, translate_es]}
calibration:
  examples: 64
  methods: [linear, lc, lc++, joint]
  lc: {steps: 3, batch_size: 7, learning_rate: 1.0e-3}
  lc++: {steps: 3, batch_size: 7, learning_rate: 1.0e-3}
  joint: {steps: 3, batch_size: 7, learning_rate: 1.0e-3}
evaluation: {examples: 2, max_new_tokens: 2}
"""


@pytest.mark.slow
def test_a_recipe_on_two_processes_gives_what_one_gives(tmp_path: Path) -> None:
    """The values that every stage trains agree to rounding."""
    runs = []
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tiny.yaml").write_text(RECIPE)
        if name == "one":
            done = forked("calibrate", "tiny.yaml", cwd=tmp_path / name)
        else:
            done = subprocess.run(
                [*launch, "-m", "caliport", "calibrate", "tiny.yaml"],
                cwd=tmp_path / name,
                env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"},
                text=True,
                capture_output=True,
            )
        assert done.returncode == 0, done.stderr
        runs.append((tmp_path / name / "runs" / "tiny", done.stderr))
    (one, _), (two, said) = runs
    assert said.count("summarize_es: lc++: done") == 1
    assert content_hash(one / "data") == content_hash(two / "data")
    made = sorted(p.relative_to(one) for p in one.rglob("*.safetensors"))
    assert len(made) == 7
    assert made == sorted(p.relative_to(two) for p in two.rglob("*.safetensors"))
    for path in made:
        single, double = (load_file(run / path) for run in (one, two))
        assert single.keys() == double.keys()
        flat = [torch.cat([side[k].flatten() for k in sorted(side)]) for side in (single, double)]
        assert (flat[0] - flat[1]).norm() < 1e-4 * flat[0].norm(), path
    assert not list(two.rglob(".*partial*")) + list(two.rglob(".*resume*"))
