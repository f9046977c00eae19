"""Reports of whole runs, small and by hand, with two artifacts that were timed together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caliport.validation.latency.statistics import spread
from caliport.validation.records.gate import Measures
from caliport.validation.records.latency import LatencyReport, LatencyResult
from caliport.validation.records.record import Machine
from caliport.validation.records.reports import (
    LATENCY,
    PARITY,
    QUALITY,
    ArtifactResult,
    Asked,
    ParityReport,
    QualityReport,
    write_result,
)
from tests.validation import examples

ASKED = Asked(prompts="a" * 64, targets="b" * 64, max_new_tokens=8, seeds={"bootstrap": 0})
SCORES = tuple(90.0 + index % 7 for index in range(40))


def artifact(precision: str = "int4", **changes: Any) -> ArtifactResult:
    """A sound artifact for ONNX whose KL and top-1 are read off 1000 positions."""
    measures = Measures(
        positions=1000,
        max_abs=0.2,
        kl=0.004,
        top1=0.985,
        perplexity=4.2,
        reference_perplexity=4.1,
    )
    found = examples.artifact("onnx", precision, [examples.gate("prefill", "lowering")])
    assert found.task is not None
    task = found.task.model_copy(
        update={
            **scoring(SCORES),
            "fp32_scores": SCORES,
            "fp32": sum(SCORES) / len(SCORES),
        }
    )
    lowering = measures.model_copy(update={"kl": 1e-6})
    sound = {"asked": ASKED, "total": measures, "quantization": measures, "lowering": lowering}
    return found.model_copy(
        update={**sound, "task": task, "parts": {"linear": 2_000_000, "rest": 900_000}, **changes}
    )


def scoring(scores: Sequence[float]) -> dict[str, Any]:
    """Changes that let an artifact's task have these scores."""
    mean = sum(scores) / len(scores)
    difference = mean - sum(SCORES) / len(SCORES)
    return {"artifact_scores": tuple(scores), "artifact": mean, "difference": difference}


def sized(count: int) -> dict[str, Any]:
    """Changes that let an artifact have so many bytes."""
    return {"bytes": count, "files": {"model.onnx": count}}


def lost() -> dict[str, Any]:
    """Changes that let an artifact fail the gate ``prefill``."""
    gates = [examples.gate("prefill", "lowering", passed=False)]
    prefill = examples.artifact("onnx", "int4", gates).prefill
    return {"gates": gates, "passed": False, "lost_at": "lowering", "prefill": prefill}


def times(precision: str = "int4", rate: float = 200.0, noise: float = 0.01, **changes: Any) -> Any:
    """One artifact's latency; rounds spread evenly by ``noise`` around the rate."""
    values = [rate * (1 + noise * step / 4) for step in range(-4, 5)]
    return (
        examples.latency()
        .artifacts[0]
        .model_copy(
            update={
                "precision": precision,
                "decode_rate": spread(values),
                "noise": None,
                "bandwidth_share": 0.5 * rate / 200,
                "peak_bytes": 70_000_000,
                **changes,
            }
        )
    )


def run_of(
    artifacts: list[ArtifactResult] | None = None,
    latencies: list[LatencyResult] | None = None,
    machine: Machine = examples.MACHINE,
    versions: dict[str, str] = examples.VERSIONS,
    loss: float = 1.1,
) -> tuple[ParityReport, LatencyReport, QualityReport]:
    """Reports of a run with an fp32 and an int4 artifact, where nothing else is asked for."""
    parity = ParityReport(
        machine=machine, versions=versions, artifacts=artifacts or [artifact("fp32"), artifact()]
    )
    latency = examples.latency().model_copy(
        update={"artifacts": latencies or [times("fp32", 100.0), times()]}
    )
    quality = examples.quality()
    methods = quality.compositions["describe in German"].methods
    methods[1] = methods[1].model_copy(update={"loss": loss})
    return parity, latency, quality


def write_run(place: Path, *reports: ParityReport | LatencyReport | QualityReport) -> Path:
    for report, name in zip(reports, (PARITY, LATENCY, QUALITY), strict=False):
        write_result(report, place / "reports" / name)
    return place
