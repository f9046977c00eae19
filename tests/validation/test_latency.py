"""Real artifacts through the whole measurement; never a time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from commands import ENVIRONMENT

from caliport.core.checkpoints import load_base
from caliport.core.errors import InputError
from caliport.core.files import file_hash
from caliport.export.artifact import Artifact
from caliport.validation.latency.child import Child
from caliport.validation.latency.measure import LOADS, measure
from caliport.validation.latency.workload import Candidate, Workload, prompt_of
from caliport.validation.records.latency import LatencyReport
from caliport.validation.records.reports import read_result
from tests.forking import forked


@pytest.fixture(scope="module")
def pte_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base as a real ExecuTorch artifact in fp32."""
    from tests.exports import to_executorch

    return to_executorch(base_dir, tmp_path_factory.mktemp("artifacts") / "executorch-fp32")


def candidate(directory: Path, label: str = "") -> Candidate:
    return Candidate(Artifact.read(directory), label)


def workers(parent: psutil.Process | None = None) -> list[psutil.Process]:
    children = (parent or psutil.Process()).children()
    return [child for child in children if "caliport.validation.latency.worker" in child.cmdline()]


def test_artifacts_are_measured_in_turns(pte_dir: Path, onnx_dir: Path, base_dir: Path) -> None:
    notes: list[str] = []
    workload = Workload(4, LOADS + 1, 1, seed=7)
    candidates = [candidate(pte_dir, "base"), candidate(onnx_dir, "composed")]
    report = measure(
        candidates, workload, prompt_of(9), lambda done, note: notes.append(f"{done} {note}")
    )
    order = [index for round_ in workload.orders(2) for index in round_]
    names = [("base executorch-fp32", "composed onnx-int4")[index] for index in order]
    assert [n.split(":")[0] for n in notes] == [f"{i} {n}" for i, n in enumerate(names, start=1)]
    assert workers() == []

    assert report.seed == 7
    assert len(report.conditions.calibration.values) == len(order)
    assert report.bandwidth_gbs > 0
    pte, onnx = report.artifacts
    assert (pte.path, pte.runtime, pte.form) == ("base/executorch-fp32", "executorch", "fp32")
    assert (onnx.path, onnx.runtime, onnx.form) == ("composed/onnx-int4", "onnx", "int4")
    for result in report.artifacts:
        assert (result.prompt_tokens, result.new_tokens, result.threads) == (9, 4, 1)
        assert result.pinned == (len(report.cores) == 1)
        assert result.bytes == sum(result.files.values())
        assert len(result.load_seconds.values) == LOADS
        for spread in (result.first_token_seconds, result.decode_rate):
            assert len(spread.values) == result.repetitions == LOADS + 1
            assert 0 < spread.low <= spread.interval[0] <= spread.median
            assert spread.median <= spread.interval[1] <= spread.high
            assert spread.level == 1 - 2 * 0.5 ** (LOADS + 1)
        assert result.token_p90_seconds > 0
        if result.peak_bytes is not None:
            assert result.idle_bytes is not None
            assert result.load_peak_bytes is not None
            assert result.idle_bytes < result.load_peak_bytes <= result.peak_bytes
        if report.cache_bytes is not None:
            assert result.bandwidth_share is None  # a few hundred kilobytes fit any cache

    model = load_base(base_dir)
    assert model.config.tie_word_embeddings  # so the head reads the table
    read = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    read += model.config.hidden_size  # all norms are ones, stored once
    config = model.config
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert pte.token_bytes == 4 * read + 4 * cached * 11  # 9 to 13 tokens of the cache
    assert onnx.token_bytes is not None
    assert onnx.token_bytes < pte.token_bytes / 3


@pytest.mark.parametrize(
    ("prompt", "new", "repetitions", "threads", "message"),
    [
        (1, 4, 0, 1, "0 repetitions of 4 new tokens after 1 with 1 threads; expected at least 1"),
        (0, 4, 1, 1, "after 0"),
        (1, 4, 1, 0, "with 0 threads"),
        (120, 20, 1, 1, r"120 \+ 20 tokens exceed the context of 128"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    onnx_dir: Path, prompt: int, new: int, repetitions: int, threads: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        measure([candidate(onnx_dir)], Workload(new, repetitions, threads), prompt_of(prompt))


def test_an_artifact_that_does_not_load_is_one_line(onnx_dir: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(onnx_dir, tmp_path / "broken")
    graph = broken / "model.onnx"
    graph.write_bytes(b"no graph")
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["files"]["model.onnx"] = {"bytes": 8, "sha256": file_hash(graph)}
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"model\.onnx: not an ONNX graph") as caught:
        measure([candidate(onnx_dir), candidate(broken)], Workload(2, 2, 1), prompt_of(4))
    assert "\n" not in str(caught.value)
    assert workers() == []


def test_a_process_that_crashes_is_one_line(onnx_dir: Path) -> None:
    job = {
        "kind": "artifact",
        "directory": str(onnx_dir),
        "composition": None,
        "prompt": [5, 6],
        "new_tokens": 2,
        "threads": 1,
        "cores": (),
    }
    with Child("the artifact", job, 1) as child:
        assert len(child.turn()["answers"][0]) == 2
        (process,) = workers()
        process.kill()
        with pytest.raises(InputError, match=r"^the artifact: its process ended .*\(SIGKILL; .*$"):
            child.turn()
    assert workers() == []


def test_an_error_between_turns_leaves_no_process(onnx_dir: Path) -> None:
    def interrupt(done: int, note: str) -> None:
        if done == LOADS + 1:  # by now a process waits for its next turn
            assert len(workers()) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure([candidate(onnx_dir)], Workload(2, LOADS + 2, 1), [5], interrupt)
    assert workers() == []


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_command_leaves_no_process(onnx_dir: Path, tmp_path: Path, how: int) -> None:
    command = [sys.executable, "-m", "caliport", "bench", str(onnx_dir), "--repetitions", "999"]
    running = subprocess.Popen(
        [*command, "--threads", "1", "--out", "out"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )
    parent = psutil.Process(running.pid)
    wait_for(lambda: len(workers(parent)) == 2)
    left = workers(parent)
    os.kill(running.pid, how)
    _, said = running.communicate(timeout=30)
    wait_for(lambda: not any(process.is_running() for process in left))
    if how == signal.SIGINT:
        assert running.returncode == 130
        assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_bench_compares_with_the_first(onnx_dir: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(onnx_dir, tmp_path / "twin")
    flags = ["--prompt-tokens", 8, "--new-tokens", 3, "--repetitions", 2, "--threads", 1]
    done = forked("bench", onnx_dir, twin, *flags, "--out", "seen", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = read_result(LatencyReport, tmp_path / "seen" / "latency.json")
    assert [result.composition for result in report.artifacts] == ["onnx-int4", "twin"]
    assert (tmp_path / "seen" / "report.html").is_file()
    noisy = [result.noisy for result in report.artifacts]
    assert (" 1.00 ±0%" in done.stdout) is not noisy[0]
    assert ("too noisy" in done.stdout) is any(noisy)
    assert ("too noisy to say" in done.stderr) is any(noisy)
