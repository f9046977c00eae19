"""What the gates say of one artifact."""

from __future__ import annotations

from pathlib import Path

import pytest

from caliport.validation.gates.verdict import validate_artifact
from caliport.validation.records.reports import ArtifactResult
from caliport.validation.runners.open import open_runner
from tests.faults.making import Fault, make
from tests.faults.scene import Scene


def check(
    scene: Scene, runtime: str, out: Path, fault: Fault | None, precision: str = ""
) -> ArtifactResult:
    """Make an artifact and validate it as ``caliport validate`` does."""
    directory = make(fault, scene, runtime, out, precision)
    said, graph = scene.expected(runtime, precision or (fault.precision if fault else "int8"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        if fault is not None and (change := fault.runner) is not None:
            monkeypatch.setattr(
                "caliport.validation.gates.verdict.open_runner",
                lambda *args: change(open_runner(*args)),
            )
        return validate_artifact(
            directory,
            scene.evaluation,
            quantized=said,
            graph=graph,
            source=scene.source,
            fp32=scene.fp32,
            base=scene.alone,
            composition="faults",
            method="lc",
        )


def failed(result: ArtifactResult) -> list[str]:
    """Names of the gates that failed, those of the named stage first."""
    found = [gate for gate in result.gates if not gate.passed]
    return [gate.name for gate in sorted(found, key=lambda gate: gate.stage != result.lost_at)]
