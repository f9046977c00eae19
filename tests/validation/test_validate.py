"""A real artifact, held against the right eager model and against wrong ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from caliport_core.errors import InputError
from export.artifact import eager, reference
from tests.validation.conftest import Scene
from validation.evaluation import Answers, eager_answers
from validation.latency import measure
from validation.results import ArtifactResult
from validation.validate import validate_artifact


@pytest.fixture(scope="module")
def int4(scene: Scene, base_dir: Path, adapter_dirs: list[Path]) -> Answers:
    model = reference(base_dir, adapter_dirs[0], "int4", "onnx")
    return eager_answers(model, "int4", scene.evaluation)


def validate(
    directory: Path, scene: Scene, quantized: Answers, references: list[str] | None = None
) -> ArtifactResult:
    return validate_artifact(
        directory,
        replace(scene.evaluation, references=references),
        quantized=quantized,
        fp32=scene.fp32,
        base=scene.base_answers,
        composition="both",
        method="lc",
    )


def test_a_sound_artifact_passes_every_gate(scene: Scene, int4: Answers, onnx_dir: Path) -> None:
    result = validate(onnx_dir, scene, int4, ["the park", "viernes", "tennis", "grüße"])
    assert [gate.name for gate in result.gates if not gate.passed] == []
    assert result.passed
    assert result.lost_at is None
    assert (result.runtime, result.precision, result.path) == ("onnx", "int4", "both/onnx-int4")
    assert result.bytes == sum(result.files.values())
    assert "model.onnx" in result.files
    assert result.task is not None
    assert result.task.interval[0] <= result.task.difference <= result.task.interval[1]


def test_an_artifact_of_another_adapter_fails(
    scene: Scene, onnx_dir: Path, base_dir: Path, adapter_dirs: list[Path]
) -> None:
    stale = replace(
        scene,
        fp32=eager_answers(eager(base_dir, adapter_dirs[1], "fp32"), "fp32", scene.evaluation),
    )
    model = reference(base_dir, adapter_dirs[1], "int4", "onnx")
    result = validate(onnx_dir, stale, eager_answers(model, "int4", scene.evaluation))
    assert not result.passed
    assert result.lost_at == "lowering"


def test_latency_states_what_was_measured(onnx_dir: Path) -> None:
    done: list[int] = []
    result = measure(onnx_dir, [5, 6, 7], 4, 3, 1, progress=lambda n, _: done.append(n))
    assert (result.prompt_tokens, result.new_tokens) == (3, 4)
    assert (result.repetitions, result.threads) == (3, 1)
    for spread in (result.load_seconds, result.first_token_seconds, result.decode_rate):
        assert 0 < spread.low <= spread.median <= spread.high
    assert done == [1, 2, 3]
    assert result.path == "onnx-int4"


@pytest.mark.parametrize(
    ("prompt", "new", "repetitions", "message"),
    [
        ([5], 4, 0, "0 repetitions of 4 new tokens after 1; expected at least 1, 2 and 1"),
        ([], 4, 1, "after 0"),
        ([5] * 120, 20, 1, r"120 \+ 20 tokens exceed the context of 128"),
    ],
)
def test_latency_refuses_what_it_cannot_time(
    onnx_dir: Path, prompt: list[int], new: int, repetitions: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        measure(onnx_dir, prompt, new, repetitions, 1)
