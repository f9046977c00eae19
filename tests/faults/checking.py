"""What the gates say of one artifact."""

from __future__ import annotations

from pathlib import Path

from caliport.export.artifact import Artifact
from caliport.validation.gates.criteria import Caption, Criteria
from caliport.validation.gates.limits import limits_for
from caliport.validation.gates.verdict import validate_artifact
from caliport.validation.records.reports import ArtifactResult
from caliport.validation.runners.open import Execution
from tests.faults.making import Fault, make
from tests.faults.scene import Scene


def check(
    scene: Scene, runtime: str, out: Path, fault: Fault | None, precision: str = ""
) -> ArtifactResult:
    """Make an artifact and validate it as ``caliport validate`` does."""
    artifact = Artifact.read(make(fault, scene, runtime, out, precision))
    expected, graph = scene.expected(artifact)
    execution = Execution(artifact)
    if fault is not None and fault.runner is not None:
        execution = Execution(artifact, runner=fault.runner(execution.open()))
    return validate_artifact(
        execution,
        Criteria(scene.evaluation, scene.fp32, scene.alone, limits_for(artifact.precision)),
        expected,
        Caption("faults", "lc"),
        graph=graph,
        source=scene.source,
    )


def failed(result: ArtifactResult) -> list[str]:
    """Names of the gates that failed, those of the named stage first."""
    found = [gate for gate in result.gates if not gate.passed]
    return [gate.name for gate in sorted(found, key=lambda gate: gate.stage != result.lost_at)]
