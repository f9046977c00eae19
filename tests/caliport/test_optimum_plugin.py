"""``optimum-cli export caliport``, as Optimum itself finds and runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from caliport.cli.app import app
from caliport.cli.optimum import CaliportExportCommand, check_task
from caliport.core.directories import read_manifest
from caliport.core.errors import InputError
from tests.forking import forked

# Optimum must find the command by what is installed, not by where the tests run.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"COLUMNS": "200"}


def optimum(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """The installed ``optimum-cli``."""
    command = [Path(sys.executable).with_name("optimum-cli"), *arguments]
    return subprocess.run(
        [*map(str, command)], cwd=cwd, env=ENVIRONMENT, text=True, capture_output=True
    )


def test_optimum_cli_exports(base_dir: Path, adapter_dirs: list[Path], tmp_path: Path) -> None:
    """What it writes is, by its key, what ``caliport export`` would have written."""
    flags = ["--adapter", adapter_dirs[0], "--runtime", "onnx", "--precision", "int8"]
    flags += ["--context", 96]
    done = optimum("export", "caliport", "--model", base_dir, *flags, "art", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "art: needs about" in done.stdout
    manifest = read_manifest(tmp_path / "art")
    assert (manifest["runtime"], manifest["precision"], manifest["context"]) == ("onnx", "int8", 96)
    assert manifest["inputs"].keys() == {"base", "adapter"}
    again = forked("export", "--base", base_dir, *flags, "--out", "art", cwd=tmp_path)
    assert "up to date, skipped" in again.stderr


FLAGS = ["--precision", "int4", "--context", "96", "--no-preflight"]
FLAGS += ["--int8-layer", "a", "--int8-layer=b", "--embedding-bits", "8", "--quantizer", "gptq"]
FLAGS += ["--calibration", "text.txt", "--calibration-tokens", "64"]


@pytest.mark.parametrize(
    "more",
    [
        ["--runtime", "onnx", "--adapter", "ADAPTER", "--push-to-hub", "me/it"],
        ["--runtime", "executorch", "--bundle", "x=ADAPTER", "--share", "y=ADAPTER", "--force"],
    ],
)
def test_flags_are_those_of_caliport_export(
    more: list[str],
    base_dir: Path,
    adapter_dirs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both ask for the same; only what names a recipe, an input or an output is not there."""
    asked: list[object] = []
    monkeypatch.setattr(
        "caliport.flags.export.export_one", lambda *given, **named: asked.append((given, named))
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Anna plays tennis with Tom. " * 50)
    flags = [*FLAGS, *(word.replace("ADAPTER", str(adapter_dirs[0])) for word in more)]
    base = str(base_dir)
    parser = ArgumentParser()
    CaliportExportCommand.parse_args(parser)
    run_optimum(parser.parse_args(["--model", base, *flags, "out"]))
    app(["export", "--base", base, *flags, "--out", "out"], standalone_mode=False)
    assert len(asked) == 2
    assert asked[0] == asked[1]
    with pytest.raises(InputError, match="--precision: found twice, expected once"):
        run_optimum(parser.parse_args(["-m", base, *flags, "--precision", "int8", "out"]))


def run_optimum(arguments: Namespace) -> None:
    parser = ArgumentParser()
    CaliportExportCommand(None, arguments, from_defaults_factory=True, parser=parser)._export()


def checkpoint(directory: Path, **config: object) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_optimum_cli_refuses_in_one_line(tmp_path: Path) -> None:
    checkpoint(tmp_path / "bert", architectures=["BertForMaskedLM"], model_type="bert")
    done = optimum("export", "caliport", "-m", "bert", "--runtime", "onnx", "art", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "caliport: bert: BertForMaskedLM is for fill-mask, expected a model for text-generation\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, "is for text2text-generation, expect"),
        ({"architectures": ["LlamaModel"]}, "is for feature-extraction, expected a model for text"),
        ({"architectures": ["NobodysModel"]}, "architecture 'NobodysModel', expected one of trans"),
        ({}, "names the architecture None"),
        ({"architecture": "resnet18"}, "a checkpoint of timm, expected one of transformers"),
    ],
)
def test_other_models_are_refused(config: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        check_task(str(checkpoint(tmp_path / "model", **config)))


def test_other_libraries_are_refused(tmp_path: Path, base_dir: Path) -> None:
    check_task(str(base_dir))
    images = checkpoint(tmp_path / "images")
    (images / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match="a checkpoint of diffusers"):
        check_task(str(images))
    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "gone"):
        with pytest.raises(InputError, match="no checkpoint that Optimum knows"):
            check_task(str(tmp_path / nothing))
