"""Reports as a run writes them, small and by hand."""

from __future__ import annotations

from caliport.validation.gates.limits import lost_at
from caliport.validation.latency.statistics import spread
from caliport.validation.records.budget import Budget, BudgetStage, StageName
from caliport.validation.records.gate import AdapterEffect, Gate, Measures, StockResult
from caliport.validation.records.latency import Conditions, LatencyReport, LatencyResult
from caliport.validation.records.record import Machine
from caliport.validation.records.reports import (
    ArtifactResult,
    CompositionResult,
    MethodResult,
    ParityReport,
    ParitySample,
    Point,
    QualityReport,
    QualitySample,
    TaskResult,
)

MACHINE = Machine(cpu="A CPU", cores=2, memory_gb=8.0, os="Linux x86_64")
VERSIONS = {"python": "3.11.9", "torch": "2.13.0"}
ATTACK = "<script>alert('ß')</script> & $x^2$ \x0b"


def quality() -> QualityReport:
    rows = [
        ("linear", "Linear merge", 0, 2.5),
        ("lcpp", "LC++", 41_000, 1.1),
        ("multi", "Steps", 0, None),
    ]
    methods = [
        MethodResult(
            method=method,
            label=label,
            loss=loss,
            rougeL=20 + stored / 2000,
            chrf=30.0,
            parameters=stored // 4,
            bytes=stored,
            passes=2 if method == "multi" else 1,
            seconds=3.5,
        )
        for method, label, stored, loss in rows
    ]
    sample = QualitySample(
        input=ATTACK, reference="Ein Mann.", outputs={"linear": "A man.", "lcpp": ATTACK}
    )
    composition = CompositionResult(
        tasks=["describe", "translate"],
        split="validation",
        examples=20,
        methods=methods,
        best="lcpp",
        samples=[sample],
    )
    return QualityReport(
        name="small",
        machine=MACHINE,
        versions=VERSIONS,
        metric="rougeL",
        compositions={"describe in German": composition},
        training={"LC++ $5": [Point(step=10, loss=2.0), Point(step=20, loss=1.2)]},
    )


def gate(name: str, stage: str, passed: bool = True, decided: bool = True) -> Gate:
    if name == "task quality" or not decided:  # of a task's difference of -1, see below
        measure, limit, found = "rougeL difference from fp32, points", -5 if decided else -1, -1.0
    else:
        measure, limit, found = "KL in nats", 0.01, 0.001 if passed else 2.5
    return Gate(
        name=name,
        measure=measure,
        limit=limit,
        found=found,
        passed=passed,
        decided=decided,
        stage=stage,
        reason=f"why {name} {ATTACK}",
    )


def artifact(runtime: str, precision: str, gates: list[Gate]) -> ArtifactResult:
    measures = Measures(
        positions=8, max_abs=0.2, kl=0.003, top1=1.0, perplexity=4.2, reference_perplexity=4.1
    )
    parts = {
        name: measures.model_copy(update={"kl": gate.found})
        for gate in gates
        if (name := gate.name) in ("prefill", "decode")
    }
    task = TaskResult(metric="rougeL", fp32=40, artifact=39, difference=-1, interval=(-2.5, 0.5))
    return ArtifactResult(
        composition="describe in German",
        method="lcpp",
        runtime=runtime,
        precision=precision,
        path=f"describe-in-german/{runtime}-{precision}",
        bytes=2_900_000,
        files={"model.pte": 2_800_000, "tokenizer.json": 100_000},
        examples=4,
        lowering=measures,
        prefill=parts.get("prefill", measures),
        decode=parts.get("decode", measures),
        one_by_one=measures,
        quantization=measures,
        total=measures,
        adapter=AdapterEffect(kl_base=2.0, kl_composition=0.003, effect=2.0),
        task=task,
        generation=0.75,
        samples=(ParitySample(input="in", reference=None, fp32="a", artifact=ATTACK),),
        gates=gates,
        stock=StockResult(runner="TextLLMRunner", matches=4, examples=4),
        passed=all(g.passed for g in gates),
        lost_at=lost_at(gates),
        seconds=1.5,
    )


def stage(
    name: StageName, kl: float | None, task: float | None, perplexity: float = 1.25, form: str = ""
) -> BudgetStage:
    """A stage of a budget; without ``kl`` the first."""
    measures = None
    if kl is not None:
        measures = Measures(
            positions=1000,
            max_abs=9 * kl**0.5,
            kl=kl,
            top1=max(0.0, 1 - 4 * kl),
            perplexity=perplexity,
            reference_perplexity=1.25,
        )
    return BudgetStage(
        stage=name,
        label=f"how {name} {ATTACK}",
        form=form,
        previous=measures,
        first=measures,
        perplexity=perplexity,
        task=task,
        by_position=() if kl is None else (kl, kl / 2, kl),
        by_layer=() if kl is None else (0.0, kl, 2 * kl),
    )


def budget(failing: bool = False, task: bool = True) -> Budget:
    """What merging, calibration and int4 did to a small composition, in two runtimes."""
    lost = stage("artifact", 2.5, 8.1, 9.6, "onnx-int4")
    stages = [
        stage("exact sum", None, 8.5, 4.1),
        stage("merge", 0.004, 8.4, 4.1),
        stage("calibration", 1.7, 91.5),
        stage("quantized eager", 0.004, 90.1, 1.26, "executorch-int4"),
        stage("artifact", 3e-6, 90.1, 1.26, "executorch-int4"),
        stage("quantized eager", 0.004, 90.7, 1.26, "onnx-int4"),
        lost if failing else stage("artifact", 0.0, 90.7, 1.26, "onnx-int4"),
    ]
    if not task:
        stages = [stage.model_copy(update={"task": None}) for stage in stages]
    return Budget(
        composition="describe in German", metric="rougeL" if task else None, stages=tuple(stages)
    )


def parity(failing: bool = False) -> ParityReport:
    sound = [gate("prefill", "lowering"), gate("task quality", "quantization")]
    broken = [gate("prefill", "lowering", passed=False), gate("decode", "lowering", passed=False)]
    artifacts = [
        artifact("executorch", "int4", sound),
        artifact("onnx", "int4", broken if failing else sound),
    ]
    return ParityReport(
        machine=MACHINE, versions=VERSIONS, artifacts=artifacts, budgets=[budget(failing)]
    )


def latency() -> LatencyReport:
    times = spread([1.5, 2.0, 2.5])
    result = LatencyResult(
        composition="describe in German",
        runtime="onnx",
        precision="int4",
        path="describe-in-german/onnx-int4",
        bytes=10,
        files={"model.onnx": 10},
        threads=2,
        pinned=True,
        prompt_tokens=16,
        new_tokens=8,
        repetitions=3,
        load_seconds=times,
        first_token_seconds=times,
        decode_rate=times,
        token_p90_seconds=0.7,
        idle_bytes=50_000_000,
        load_peak_bytes=60_000_000,
        peak_bytes=70_000_000,
        token_bytes=100_000_000,
        bandwidth_share=0.02,
        noise=f"decode rate: {ATTACK}",
    )
    conditions = Conditions(
        calibration=times, load_average=1.5, steal=0.02, others=0.7, noise=f"uneasy {ATTACK}"
    )
    return LatencyReport(
        machine=MACHINE,
        versions=VERSIONS,
        seed=0,
        cores=(0, 1),
        bandwidth_gbs=10.0,
        cache_bytes=32_000_000,
        conditions=conditions,
        artifacts=[result],
    )
