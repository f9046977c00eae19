"""Artifacts without a manifest of ours, and one artifact held to another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.conftest import random_adapter
from tests.exports import to_executorch, to_onnx
from tests.forking import forked


@pytest.fixture(scope="module")
def base_dir(one_layer: tuple[Path, list[Path]]) -> Path:
    return one_layer[0]


@pytest.fixture(scope="module")
def adapter_dirs(one_layer: tuple[Path, list[Path]]) -> list[Path]:
    return one_layer[1]


@pytest.fixture(scope="module")
def artifacts(
    base_dir: Path, adapter_dirs: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Ours for both runtimes in int4, and each as another tool would leave it."""
    root = tmp_path_factory.mktemp("artifacts")
    adapter = adapter_dirs[0]
    to_executorch(base_dir, root / "ours-executorch", adapter=adapter, precision="int4")
    to_onnx(base_dir, root / "ours-onnx", adapter=adapter, precision="int4")
    for name, program in (("executorch", "model.pte"), ("onnx", "model.onnx")):
        shutil.copytree(root / f"ours-{name}", root / name)
        (root / name / "manifest.json").unlink()
        assert (root / name / program).is_file()
    (root / "executorch/model.pte").rename(root / "executorch/llama.pte")
    return root


Validate = Callable[..., CompletedProcess[str]]


@pytest.fixture
def validate(artifacts: Path, base_dir: Path) -> Validate:
    def run(name: str, *flags: object) -> CompletedProcess[str]:
        return forked("validate", name, "--base", base_dir, *flags, cwd=artifacts)

    return run


@pytest.mark.parametrize("runtime", ["executorch", "onnx"])
def test_a_program_of_another_tool(
    runtime: str,
    validate: Validate,
    artifacts: Path,
    base_dir: Path,
    adapter_dirs: list[Path],
    tmp_path: Path,
) -> None:
    said = ("--precision", "int4", "--no-latency")
    done = validate(runtime, *said, "--adapter", adapter_dirs[0], "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "parity.json").read_text())["artifacts"]
    gates = {gate["name"]: gate["passed"] for gate in row["gates"]}
    assert {"one by one", "adapter is in there"} <= gates.keys()
    assert "judged together" in row["notes"][0]
    assert (tmp_path / "report.html").is_file()
    other = random_adapter(base_dir, tmp_path / "other", seed=9)
    done = validate(runtime, *said, "--adapter", other)
    assert done.returncode == 1, "the adapter of another task passed"
    assert not (artifacts / runtime / "manifest.json").exists()


def test_one_artifact_against_another(validate: Validate, adapter_dirs: list[Path]) -> None:
    flags = ("--adapter", adapter_dirs[0], "--against", "ours-executorch", "--no-latency")
    done = validate("ours-onnx", *flags)
    assert done.returncode == 0, done.stdout + done.stderr


def test_latency_of_another_tools_program(artifacts: Path, tmp_path: Path) -> None:
    short = ("--prompt-tokens", "8", "--new-tokens", "4", "--repetitions", "1", "--threads", "1")
    done = forked("bench", "onnx", "executorch", *short, "--out", tmp_path, cwd=artifacts)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "latency.json").read_text())["artifacts"]
    assert [row["precision"] for row in rows] == ["unknown"] * 2


def test_what_is_missing_is_named(validate: Validate, tmp_path: Path) -> None:
    for name, flags, says in (
        ("onnx", (), "onnx: has no manifest; expected --precision to say what it is"),
        ("onnx", ("--precision", "int3"), "precision 'int3' has no limits"),
        ("ours-onnx", ("--precision", "int4"), "has a manifest that says it"),
        (tmp_path, ("--precision", "int4"), "no manifest.json; expected a directory made by"),
    ):
        done = validate(name, *flags)
        assert done.returncode == 2
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
