"""The Python face: what docs show, with paths as strings."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from commands import ENVIRONMENT

import caliport
from caliport.calibrate import LowRankUpdate, read_peft
from caliport.core.errors import InputError
from caliport.core.prompts import recorded_prompt
from caliport.export import Artifact
from caliport.stages.sources import Source

FACE = ("compose", "export", "generate", "load", "validate")


@pytest.fixture(scope="module")
def composed(
    base_dir: Path, adapter_dirs: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> str:
    out = str(tmp_path_factory.mktemp("composed") / "both")
    caliport.compose(str(base_dir), [str(path) for path in adapter_dirs], out, method="exact")
    return out


@pytest.fixture(scope="module")
def artifact(base_dir: Path, composed: str, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = str(tmp_path_factory.mktemp("artifacts") / "onnx")
    return caliport.export(str(base_dir), out, runtime="onnx", adapter=composed, precision="int4")


def test_an_artifact_is_validated_in_three_lines(
    artifact: Artifact, base_dir: Path, composed: str
) -> None:
    result = caliport.validate(str(artifact.directory), str(base_dir), composed)
    assert result.passed


def test_an_artifact_answers(artifact: Artifact, base_dir: Path) -> None:
    runner = caliport.load(artifact)
    assert runner.prefill([5, 6]).shape == (384,)
    text = caliport.generate(str(artifact.directory), "the park", max_new_tokens=4)
    assert text == caliport.generate(artifact, "the park", max_new_tokens=4, threads=1)


def test_what_is_wrong_ends_in_one_line(base_dir: Path, composed: str, tmp_path: Path) -> None:
    wrong = [
        lambda: caliport.export(base_dir, tmp_path / "no", runtime="tflite"),
        lambda: caliport.export(base_dir, tmp_path / "no", runtime="onnx", precision="int3"),
        lambda: caliport.compose(base_dir, [composed], tmp_path / "no", method="median"),
        lambda: caliport.compose(base_dir, [composed], tmp_path / "no", method="lc"),
        lambda: caliport.load(tmp_path),
        lambda: caliport.generate(tmp_path / "gone", "text"),
        lambda: caliport.validate(tmp_path / "gone", base_dir),
    ]
    for call in wrong:
        with pytest.raises(InputError) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_composition_has_its_prompt(
    base_dir: Path, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    """As ``--prompt`` gives it; a ``Source`` has its own."""
    prompt = "Shorten:\n{input}"
    out = caliport.compose(base_dir, adapter_dirs, tmp_path / "out", method="linear", prompt=prompt)
    assert recorded_prompt(out) == prompt
    source = Source(tmp_path / "data.jsonl", "{input}")
    for data, wrong, says in (
        (None, "Shorten", "prompt 'Shorten' has no {input}"),
        (source, prompt, "another than that of the Source"),
    ):
        with pytest.raises(InputError, match=says):
            caliport.compose(
                base_dir, adapter_dirs, tmp_path / "no", method="linear", data=data, prompt=wrong
            )


def test_every_function_explains_itself() -> None:
    for name in FACE:
        function = getattr(caliport, name)
        if name == "export":
            assert list(inspect.signature(function).parameters)[:2] == ["base", "out"]
            function = function.export
        text = inspect.getdoc(function)
        assert text is not None
        for name_of_argument in inspect.signature(function).parameters:
            assert f"{name_of_argument}: " in text, (name, name_of_argument)
        assert "Raises:" in text
        assert "Example:" in text
    assert caliport.__version__ == metadata.version("caliport")
    assert set(FACE) <= set(dir(caliport))


def test_objects_are_shown_shortly(artifact: Artifact, composed: str) -> None:
    update = read_peft(composed)
    assert isinstance(update, LowRankUpdate)
    assert repr(update) == f"LowRankUpdate(14 modules, rank 8, {update.parameter_count:,} values)"
    assert len(repr(artifact)) < 200
    assert "onnx" in repr(artifact)


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, caliport, caliport.export\n"
        "caliport.export, caliport.__version__\n"
        "print([m for m in ('torch', 'transformers', 'onnx', 'executorch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, text=True, capture_output=True, check=True
    )
    assert done.stdout.strip() == "[]"
