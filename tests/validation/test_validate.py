"""A real artifact, held against the right eager model and against wrong ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from caliport.export.artifact import Artifact
from caliport.export.reference.folded import eager, reference
from caliport.validation.evaluation.evaluation import eager_answers
from caliport.validation.evaluation.probes import make_probes
from caliport.validation.gates.criteria import Caption, Criteria
from caliport.validation.gates.limits import limits_for
from caliport.validation.gates.rounding import Expected, expected_of
from caliport.validation.gates.verdict import validate_artifact
from caliport.validation.records.reports import ArtifactResult
from caliport.validation.runners.open import Execution
from tests.validation.conftest import Scene


def int4_of(scene: Scene, base: Path, adapter: Path) -> Expected:
    model = reference(base, adapter, "int4", "onnx")
    answers = eager_answers(model, "int4", scene.evaluation)
    return expected_of(model, answers, scene.evaluation, make_probes(384, 128))


@pytest.fixture(scope="module")
def int4(scene: Scene, base_dir: Path, adapter_dirs: list[Path]) -> Expected:
    return int4_of(scene, base_dir, adapter_dirs[0])


def validate(
    directory: Path, scene: Scene, quantized: Expected, references: list[str] | None = None
) -> ArtifactResult:
    evaluation = replace(scene.evaluation, references=references)
    return validate_artifact(
        Execution(Artifact.read(directory)),
        Criteria(evaluation, scene.fp32, scene.base_answers, limits_for("int4")),
        quantized,
        Caption("both", "lc"),
    )


def test_a_sound_artifact_passes_every_gate(scene: Scene, int4: Expected, onnx_dir: Path) -> None:
    result = validate(onnx_dir, scene, int4, ["the park", "viernes", "tennis", "grüße"])
    assert [gate.name for gate in result.gates if not gate.passed] == []
    assert result.passed
    assert result.lost_at is None
    assert (result.runtime, result.precision, result.path) == ("onnx", "int4", "both/onnx-int4")
    assert result.bytes == sum(result.files.values())
    assert "model.onnx" in result.files
    assert result.task is not None
    assert result.task.interval[0] <= result.task.difference <= result.task.interval[1]


def test_few_prompts_are_asked_again_until_rounding_has_shown_itself(
    scene: Scene, int4: Expected
) -> None:
    """A flipped step is rare: in two evaluations of a hundred positions there may be none."""
    once = sum(map(len, scene.fp32.logits)) + len(int4.said.echo.sweep)
    assert sum(map(len, int4.noise.values())) >= min(2000, 8 * once)


def test_an_artifact_of_another_adapter_fails(
    scene: Scene, onnx_dir: Path, base_dir: Path, adapter_dirs: list[Path]
) -> None:
    stale = replace(
        scene,
        fp32=eager_answers(eager(base_dir, adapter_dirs[1], "fp32"), "fp32", scene.evaluation),
    )
    result = validate(onnx_dir, stale, int4_of(scene, base_dir, adapter_dirs[1]))
    assert not result.passed
    assert result.lost_at == "lowering"
