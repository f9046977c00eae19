"""The ONNX runner, built for this machine, says what the Python one says, to the last bit."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, caliport
from hypothesis import given
from hypothesis import strategies as st

from caliport.android_harness.runners.job import Answer, Job, Prompt, Result, Row, Timing, Turn
from caliport.android_harness.runners.kinds import JobRunner, answers, read_runner
from caliport.core.errors import InputError
from caliport.validation.runners.onnx import OnnxRunner
from tests.exports import to_onnx, to_onnx_bundle

CONTEXT = 96
CACHE = ROOT / "build" / "runner"


@pytest.fixture(scope="session")
def runner() -> JobRunner:
    """Built once a change: what was fetched and compiled stays in ``build``."""
    place = ROOT / "build" / "host"
    done = caliport(
        "runner", "build", "--target", "host", "--out", place, "--cache", CACHE, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert str(place) in done.stdout
    return read_runner(place)


@pytest.fixture(scope="module")
def artifact_of(
    base_dir: Path, adapter_dirs: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Each precision once, int4 as a bundle of two compositions."""
    root = tmp_path_factory.mktemp("jobs")
    made: dict[str, Path] = {}

    def artifact(form: str) -> Path:
        if form not in made:
            if form == "int4":
                bundled = {"one": adapter_dirs[0], "two": adapter_dirs[1]}
                made[form] = to_onnx_bundle(base_dir, bundled, root / form, context=CONTEXT)
            else:
                made[form] = to_onnx(
                    base_dir, root / form, adapter=adapter_dirs[0], precision=form, context=CONTEXT
                )
        return made[form]

    return artifact


def run(
    runner: JobRunner, job: dict[str, Any] | Job, place: Path
) -> subprocess.CompletedProcess[str]:
    text = job.model_dump_json() if isinstance(job, Job) else json.dumps(job)
    (place / "job.json").write_text(text, encoding="utf-8")
    command = runner.started(str(runner.directory), "job.json", "result.json")
    return subprocess.run(command, cwd=place, capture_output=True, text=True)


def result_of(runner: JobRunner, job: Job, place: Path) -> Result:
    done = run(runner, job, place)
    assert (done.returncode, done.stderr) == (0, "")
    return Result.model_validate_json((place / "result.json").read_bytes())


@pytest.mark.parametrize(
    ("form", "adapter"),
    [
        ("fp32", None),
        ("int8", None),
        ("int4", None),
        ("int4", "one.onnx_adapter"),
        ("int4", "two.onnx_adapter"),
    ],
)
def test_it_says_what_the_python_runner_says(
    runner: JobRunner,
    artifact_of: Callable[[str], Path],
    prompts: list[list[int]],
    form: str,
    adapter: str | None,
) -> None:
    directory = artifact_of(form)
    python = OnnxRunner(
        directory, threads=1, adapter=None if adapter is None else directory / adapter
    )
    free = Job(
        runtime="onnx",
        directory=form,
        adapter=adapter,
        threads=1,
        max_new_tokens=CONTEXT,
        prompts=(Prompt(tokens=tuple(prompts[0])),),
    )
    (written,) = answers(python, free)
    assert written.tokens is not None
    assert len(written.tokens) == CONTEXT - len(prompts[0])  # to the context's end
    end = written.tokens[5]
    given = [
        Prompt(tokens=tuple(prompts[0])),
        Prompt(tokens=tuple(prompts[1]), targets=tuple(prompts[2][:9]), write=False),
        Prompt(tokens=tuple(prompts[2]), targets=tuple(prompts[0])),
        Prompt(tokens=tuple([7] * CONTEXT), targets=(3,)),
    ]
    job = free.model_copy(update={"prompts": tuple(given), "ends": (383, end), "top": 7})
    found = result_of(runner, job, directory.parent)
    expected = answers(python, job)
    assert expected[0].tokens == written.tokens[: written.tokens.index(end) + 1]
    for mine, theirs in zip(found.answers, expected, strict=True):
        assert mine.tokens == theirs.tokens
        for row, reference in zip(mine.rows, theirs.rows, strict=True):
            assert (row.ids, row.logits) == (reference.ids, reference.logits)
            assert row.mean == pytest.approx(reference.mean, rel=1e-12, abs=1e-12)
            assert row.logsumexp == pytest.approx(reference.logsumexp, rel=1e-12)


def test_it_times_on_the_cores_it_is_told(
    runner: JobRunner, artifact_of: Callable[[str], Path]
) -> None:
    directory = artifact_of("int4")
    core = min(os.sched_getaffinity(0))
    timing = Timing(prompt_lengths=(16, 4), new_tokens=3, warmup=2, repetitions=2)
    job = Job(
        runtime="onnx",
        directory="int4",
        threads=2,
        cores=(core,),
        max_new_tokens=1,
        timing=timing,
    )
    found = result_of(runner, job, directory.parent)
    assert (found.cores, found.threads, found.answers) == ((core,), 2, ())
    assert [turn.prompt_tokens for turn in found.turns] == [16, 4, 16, 4]
    for turn in found.turns:
        assert len(turn.step_seconds) == 2
        assert all(0 < s < 1 for s in (turn.first_token_seconds, *turn.step_seconds))
    assert 0 < found.load_seconds < 10
    graph = sum(file.stat().st_size for file in directory.glob("model.onnx*"))
    assert 2e6 < found.idle_bytes < found.loaded_bytes - graph / 2
    assert found.loaded_bytes <= found.peak_bytes < 1e9
    import onnxruntime

    assert found.runtime_version == onnxruntime.__version__


GOOD: dict[str, Any] = {
    "version": 1,
    "runtime": "onnx",
    "directory": "int4",
    "threads": 1,
    "max_new_tokens": 4,
    "prompts": [{"tokens": [5, 6]}],
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"version": 2}, "version: found 2, expected 1"),
        ({"runtime": "executorch"}, "runtime: found executorch, expected onnx"),
        ({"runtime": None}, "runtime: missing"),
        ({"threads": 0}, "threads: found 0, expected a whole number of 1 or more"),
        ({"threads": 1.5}, "threads: found 1.5, expected a whole number"),
        ({"threads": 1 << 40}, "threads: found 1099511627776, expected"),
        ({"cores": [1 << 20]}, "cores: this process cannot stay on all .* such as 1048576"),
        ({"prompts": [{"tokens": []}]}, "prompts.0: tokens: found none, expected at least one"),
        ({"prompts": [{"tokens": [1], "write": 1}]}, "write: found 1, expected true or false"),
        ({"prompts": [{"tokens": [-1]}]}, "tokens: found -1, expected a whole number of 0"),
        ({"prompts": [{"tokens": [384]}]}, "token 384, expected 0 to 383"),
        ({"prompts": [{"tokens": [1] * 97}]}, "97 tokens after 0, expected 1 to 96"),
        ({"timing": {"prompt_lengths": [96], "new_tokens": 2}}, "1 tokens after 96"),
        ({"timing": {"prompt_lengths": [4]}}, "timing: new_tokens: missing"),
        ({"speed": 3}, "speed: unknown field"),
        ({"directory": "none"}, "none/genai_config.json: cannot be read"),
        ({"adapter": "none.onnx_adapter"}, "int4/none.onnx_adapter: not an adapter"),
    ],
)
def test_a_bad_job_is_one_line(
    runner: JobRunner, artifact_of: Callable[[str], Path], change: dict[str, Any], expected: str
) -> None:
    place = artifact_of("int4").parent
    (place / "result.json").unlink(missing_ok=True)
    done = run(runner, {**GOOD, **change}, place)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"caliport-onnx: .*{expected}.*\n", done.stderr), done.stderr
    assert not list(place.glob("result.json*"))


def test_bad_files_are_one_line(
    runner: JobRunner, artifact_of: Callable[[str], Path], tmp_path: Path
) -> None:
    artifact = artifact_of("int4")
    config = json.loads((artifact / "genai_config.json").read_text())
    for name, part in [("cut", b"x"), ("empty", b"")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "genai_config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.onnx").write_bytes(part)
        done = run(runner, {**GOOD, "directory": name}, tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "model.onnx" in done.stderr
    del config["model"]["decoder"]["head_size"]
    (tmp_path / "cut" / "genai_config.json").write_text(json.dumps(config))
    done = run(runner, {**GOOD, "directory": "cut"}, tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"caliport-onnx: cut/genai_config.json: .*head_size.*\n", done.stderr)
    command = runner.started(str(runner.directory), "job.json", "nowhere/result.json")
    (tmp_path / "int4").symlink_to(artifact)
    (tmp_path / "job.json").write_text(json.dumps(GOOD))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("caliport-onnx: nowhere/result.json: cannot be written")
    (tmp_path / "job.json").write_text("{")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"caliport-onnx: job.json: not JSON .*\n", done.stderr)


@pytest.mark.parametrize("name", ["job.json", "art/genai_config.json", "art/model.onnx.data"])
def test_a_named_pipe_is_not_waited_for(
    name: str, runner: JobRunner, artifact_of: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(artifact_of("int4"), tmp_path / "art")
    (tmp_path / "job.json").write_text(json.dumps({**GOOD, "directory": "art"}))
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    command = runner.started(str(runner.directory), "job.json", "result.json")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert re.fullmatch(rf"caliport-onnx: {name}: not a regular file.*\n", done.stderr)


def test_it_sends_no_usage_events(
    runner: JobRunner, artifact_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """ONNX Runtime keeps an id of the machine in the home as soon as it is loaded to send any."""
    (tmp_path / "fp32").symlink_to(artifact_of("fp32"))
    (tmp_path / "job.json").write_text(json.dumps({**GOOD, "directory": "fp32", "adapter": None}))
    home = tmp_path / "home"
    home.mkdir()
    kept = {k: v for k, v in os.environ.items() if k not in ("ORT_DISABLE_TELEMETRY", "HOME")}
    kept = {k: v for k, v in kept.items() if not k.startswith("XDG_")}
    command = runner.started(str(runner.directory), "job.json", "result.json")
    done = subprocess.run(command, cwd=tmp_path, env={**kept, "HOME": str(home)}, check=False)
    assert done.returncode == 0
    assert list(home.iterdir()) == []


def test_a_runner_that_was_changed_is_refused(runner: JobRunner, tmp_path: Path) -> None:
    assert runner.directory is not None
    shutil.copytree(runner.directory, tmp_path, dirs_exist_ok=True)
    assert read_runner(tmp_path).command == runner.command
    (tmp_path / "caliport-onnx").write_bytes(b"\x7fELF")
    with pytest.raises(InputError, match=r"caliport-onnx: 4 bytes, manifest.json records"):
        read_runner(tmp_path)


@pytest.mark.android
def test_a_bundle_for_any_linux_needs_nothing_of_the_system(
    artifact_of: Callable[[str], Path], prompts: list[list[int]], tmp_path: Path
) -> None:
    """In a root directory that holds the bundle and the artifact and nothing else."""
    build = ("runner", "build", "--target", platform.machine(), "--out", tmp_path / "runner")
    done = caliport(*build, "--cache", CACHE, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    artifact = artifact_of("int8")
    shutil.copytree(artifact, tmp_path / "art")
    job = Job(
        runtime="onnx",
        directory="art",
        threads=1,
        max_new_tokens=8,
        prompts=(Prompt(tokens=tuple(prompts[0])),),
    )
    (tmp_path / "job.json").write_text(job.model_dump_json(), encoding="utf-8")
    command = read_runner(tmp_path / "runner").started("/runner", "job.json", "result.json")
    (tmp_path / "proc").mkdir()
    alone = ["unshare", "--fork", "--pid", f"--mount-proc={tmp_path / 'proc'}", "chroot", tmp_path]
    ran = subprocess.run([*alone, *command], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    found = Result.model_validate_json((tmp_path / "result.json").read_bytes())
    assert found.answers[0].tokens == answers(OnnxRunner(artifact, threads=1), job)[0].tokens


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--target", "phone"],
            "target is 'phone', expected one of host, x86_64, aarch64",
        ),
        (["--target", "android"], "expected --ndk DIR, Android's NDK"),
    ],
)
def test_a_build_that_cannot_be_is_one_line(
    tmp_path: Path, flags: list[str], expected: str
) -> None:
    done = caliport("runner", "build", *flags, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


IDS = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)
SOME = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4).map(tuple)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
SECONDS = st.floats(0, 1e6)
JOBS = st.builds(
    Job,
    runtime=st.sampled_from(["onnx", "executorch"]),
    directory=st.text(),
    adapter=st.none() | st.text(),
    threads=st.integers(1, 64),
    cores=IDS,
    ends=IDS,
    max_new_tokens=st.integers(1, 10**6),
    top=st.integers(1, 10**6),
    prompts=st.lists(
        st.builds(Prompt, tokens=SOME, targets=IDS, write=st.booleans()), max_size=3
    ).map(tuple),
    timing=st.none()
    | st.builds(Timing, prompt_lengths=st.just((3, 4)), new_tokens=st.integers(1, 9)),
)
RESULTS = st.builds(
    Result,
    runner=st.text(),
    runtime_version=st.text(),
    threads=st.integers(1, 64),
    cores=IDS,
    load_seconds=SECONDS,
    peak_bytes=st.integers(0, 2**40),
    loaded_bytes=st.integers(0, 2**40),
    idle_bytes=st.integers(0, 2**40),
    answers=st.lists(
        st.builds(
            Answer,
            tokens=st.none() | IDS,
            rows=st.lists(
                st.builds(
                    Row,
                    ids=IDS,
                    logits=st.lists(NUMBERS, max_size=3).map(tuple),
                    mean=NUMBERS,
                    logsumexp=NUMBERS,
                ),
                max_size=2,
            ).map(tuple),
        ),
        max_size=2,
    ).map(tuple),
    turns=st.lists(
        st.builds(
            Turn,
            prompt_tokens=st.integers(1, 99),
            first_token_seconds=SECONDS,
            step_seconds=st.lists(SECONDS, max_size=3).map(tuple),
        ),
        max_size=2,
    ).map(tuple),
)


@given(job=JOBS, result=RESULTS)
def test_what_is_written_is_read_back(job: Job, result: Result) -> None:
    assert Job.model_validate_json(job.model_dump_json()) == job
    assert Result.model_validate_json(result.model_dump_json()) == result
