"""A stored run, and later runs held to it. The reports are small and by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from caliport.core.errors import InputError
from caliport.validation.baseline.baseline import (
    MARK,
    Baseline,
    baseline_of,
    file_name,
    read_baseline,
    reports_of,
    write_baseline,
)
from caliport.validation.baseline.regression import RegressionLimits, hold_to
from caliport.validation.records.latency import LatencyReport, LatencyResult
from caliport.validation.records.record import Machine
from caliport.validation.records.reports import ArtifactResult, ParityReport, QualityReport
from caliport.validation.report.junit import write_junit
from caliport.validation.report.page import write_report
from tests.validation import examples
from tests.validation.runs import ASKED, SCORES, artifact, run_of, scoring, sized, times, write_run


@pytest.fixture
def stored(tmp_path: Path) -> Baseline:
    return baseline_of(reports_of(write_run(tmp_path / "run", *run_of())))


def hold(
    baseline: Baseline,
    run: tuple[ParityReport, LatencyReport, QualityReport],
    limits: RegressionLimits | None = None,
) -> ParityReport:
    parity, latency, quality = run
    return hold_to(
        parity,
        latency.artifacts,
        quality,
        Path("baselines/one.json"),
        baseline,
        limits or RegressionLimits(),
    )


def gates(report: ParityReport, index: int = 1) -> dict[str, Any]:
    """The gates against the baseline of one artifact by their names without the mark."""
    found = report.artifacts[index].gates
    return {g.name.removeprefix(MARK): g for g in found if g.name.startswith(MARK)}


def test_what_is_stored_comes_back_and_holds_no_time(tmp_path: Path, stored: Baseline) -> None:
    path = write_baseline(stored, tmp_path / "kept" / "one.json")
    assert read_baseline(path, examples.MACHINE) == (path, stored)
    text = path.read_text()
    assert write_baseline(stored, path).read_text() == text
    assert text.endswith("}\n")
    numbers = [float(n) for n in re.findall(r"(?<=[ \[])-?\d[\d.e-]*(?=[,\n\]])", text)]
    assert not {100.0, 200.0} & set(numbers), "a decode rate was stored"
    assert "seconds" not in text
    lines = [line for line in text.splitlines() if '"scores"' in line]
    assert len(lines) == 2
    assert lines[0].strip() == f'"scores": [{", ".join(map(str, SCORES))}]'
    data = json.loads(text)
    assert list(data["artifacts"]) == sorted(data["artifacts"])
    speed = data["artifacts"]["describe in German: onnx int4"]["speed"]
    assert speed["relative"]["value"] == pytest.approx(2.0, rel=1e-3)
    assert data["artifacts"]["describe in German: onnx fp32"]["speed"]["relative"] is None
    assert data["compositions"]["describe in German"] == {
        "method": "lcpp",
        "loss": 1.1,
        "examples": 20,
    }


def test_a_directory_has_a_file_for_each_machine(tmp_path: Path, stored: Baseline) -> None:
    other = Machine(cpu="Cortex-X4 (8)", cores=8, memory_gb=12, os="Linux aarch64")
    write_baseline(stored.model_copy(update={"machine": other}), tmp_path / "kept")
    first, found = read_baseline(tmp_path / "kept", examples.MACHINE)
    assert first.name == "cortex-x4-8-8-cores-linux-aarch64.json"
    assert found.machine == other, "without a file of its own a machine is held to another's"
    own = write_baseline(stored, tmp_path / "kept")
    assert own.name == file_name(examples.MACHINE) == "a-cpu-2-cores-linux-x86_64.json"
    assert read_baseline(tmp_path / "kept", examples.MACHINE) == (own, stored)


def test_a_run_passes_its_own_baseline(stored: Baseline) -> None:
    report = hold(stored, run_of())
    for index in (0, 1):
        assert all(g.passed and g.decided for g in gates(report, index).values())
    assert set(gates(report)) == {
        "exported method",
        "task quality",
        "distribution",
        "favourite tokens",
        "size",
        "peak memory",
        "speed over fp32",
        "share of memory bandwidth",
    }
    assert "speed over fp32" not in gates(report, 0), "fp32 has nothing to be faster than"
    assert report.baseline is not None
    assert report.baseline.notes == ()
    assert [a.passed for a in report.artifacts] == [True, True]


def worse_task(by: float) -> ArtifactResult:
    found = artifact()
    assert found.task is not None
    scores = tuple(score - by for score in SCORES)
    return artifact(task=found.task.model_copy(update=scoring(scores)))


def measured(**changes: float) -> ArtifactResult:
    total = artifact().total
    assert total is not None
    return artifact(
        total=total.model_copy(update=changes), quantization=total.model_copy(update=changes)
    )


def lowered(kl: float) -> ArtifactResult:
    found = artifact()
    assert found.total is not None
    assert found.lowering is not None
    lowering = found.lowering.model_copy(update={"kl": kl})
    return artifact(total=found.total.model_copy(update={"kl": 0.004 + kl}), lowering=lowering)


def with_artifact(found: ArtifactResult) -> tuple[ParityReport, LatencyReport, QualityReport]:
    return run_of([artifact("fp32"), found])


def with_times(found: LatencyResult) -> tuple[ParityReport, LatencyReport, QualityReport]:
    return run_of(latencies=[times("fp32", 100.0), found])


@pytest.mark.parametrize(
    ("run", "failed", "lost_at", "says"),
    [
        (
            lambda: with_artifact(worse_task(3.0)),
            {"task quality"},
            "quantization",
            r"interval of the change -3\.00 to -3\.00 \(paired\); 1 points may be lost",
        ),
        (
            lambda: with_artifact(measured(kl=0.006)),
            {"distribution"},
            "quantization",
            r"KL from fp32 0\.004 before, 0\.006 now; it may grow by 25%",
        ),
        (lambda: with_artifact(lowered(0.002)), {"distribution"}, "lowering", "0.006 now"),
        (
            lambda: with_artifact(measured(top1=0.97)),
            {"favourite tokens"},
            "quantization",
            r"\+15 of 1000 positions differ, 10 may",
        ),
        (
            lambda: with_artifact(
                artifact(**sized(3_100_000), parts={"linear": 2_200_000, "rest": 900_000})
            ),
            {"size"},
            "size",
            r"2,900,000 bytes before, 3,100,000 now, most in linear \(\+200,000\)",
        ),
        (
            lambda: with_times(times(peak_bytes=73_000_000)),
            {"peak memory"},
            "memory",
            r"20\.0 MB before, 23\.0 MB now over the process before loading; it may grow by 10%",
        ),
        (
            lambda: with_times(times(rate=150.0, bandwidth_share=0.5)),
            {"speed over fp32"},
            "speed",
            r"2 before, 1\.5 now: -25\.0%, joint noise \d\.\d%; 10% may be lost",
        ),
        (
            lambda: with_times(times(bandwidth_share=0.4)),
            {"share of memory bandwidth"},
            "speed",
            r"0\.5 before, 0\.4 now: -20\.0%",
        ),
        (
            lambda: run_of(loss=1.2),
            {"exported method"},
            "calibration",
            r"loss 1\.1000 before, 1\.2000 now; it may grow by 0\.02",
        ),
    ],
    ids=["task", "kl", "lowering", "top1", "size", "memory", "speed", "bandwidth", "loss"],
)
def test_each_kind_of_loss_fails_its_own_gate_alone(
    stored: Baseline,
    run: Callable[[], tuple[ParityReport, LatencyReport, QualityReport]],
    failed: set[str],
    lost_at: str,
    says: str,
) -> None:
    report = hold(stored, run())
    found = gates(report)
    assert {name for name, gate in found.items() if not gate.passed} == failed
    (name,) = failed
    assert re.search(says, found[name].reason), found[name].reason
    assert not report.artifacts[1].passed
    assert report.artifacts[1].lost_at == lost_at


def test_what_is_better_or_within_the_limits_passes(stored: Baseline) -> None:
    better = measured(kl=0.001, top1=0.999).model_copy(
        update={**sized(2_000_000), "task": worse_task(-3.0).task}
    )
    runs = [
        run_of([artifact("fp32"), better], [times("fp32", 100.0), times(rate=400.0)], loss=0.5),
        run_of(
            [
                artifact("fp32"),
                measured(kl=0.0049, top1=0.976).model_copy(update=sized(2_950_000)),
            ],
            [times("fp32", 100.0), times(rate=184.0, peak_bytes=71_900_000)],
            loss=1.119,
        ),
    ]
    for run in runs:
        report = hold(stored, run)
        assert [g.name for g in report.artifacts[1].gates if not g.passed] == []
        assert report.artifacts[1].passed


def test_limits_are_the_recipes(stored: Baseline) -> None:
    limits = RegressionLimits(margin=5, kl=1, top1=0.1, size=0.5, memory=0.5, speed=0.5, loss=1)
    worse = measured(kl=0.007, top1=0.95).model_copy(
        update={**sized(4_000_000), "task": worse_task(4.0).task}
    )
    slow = times(rate=120.0, peak_bytes=79_000_000)
    run = run_of([artifact("fp32"), worse], [times("fp32", 100.0), slow])
    assert hold(stored, run, limits).artifacts[1].passed
    assert not hold(stored, run).artifacts[1].passed


def test_memory_of_python_and_the_runtime_is_not_the_artifacts(stored: Baseline) -> None:
    """Another version of a library moves both; baselines from before hold peaks alone."""
    moved = with_times(times(idle_bytes=90_000_000, peak_bytes=111_000_000))
    assert gates(hold(stored, moved))["peak memory"].passed
    text = re.sub(r'"idle_bytes":\d+,', "", stored.model_dump_json())
    gate = gates(hold(Baseline.model_validate_json(text), moved))["peak memory"]
    assert gate.reason == "70.0 MB before, 111.0 MB now; it may grow by 10%"
    assert not gate.passed


def test_noise_neither_fails_nor_hides_a_loss(stored: Baseline) -> None:
    """A loss inside the joint noise is left open, and one far beyond it is found all the same."""
    small = gates(hold(stored, with_times(times(rate=170.0, noise=0.3))))["speed over fp32"]
    assert small.passed
    assert not small.decided
    assert "the times vary too much to say" in small.reason
    large = gates(hold(stored, with_times(times(rate=60.0, noise=0.3))))["speed over fp32"]
    assert not large.passed


def test_too_noisy_or_otherwise_timed_is_not_held_and_said(stored: Baseline) -> None:
    uneasy = times().model_copy(update={"noise": "uneasy"})
    report = hold(stored, with_times(uneasy))
    assert report.baseline is not None
    assert "speed over fp32" not in gates(report)
    assert any("speed over fp32 is not held to it" in note for note in report.baseline.notes)
    report = hold(stored, with_times(times(threads=4)))
    assert report.baseline is not None
    assert "speed over fp32" not in gates(report)
    assert any("timed with 2 threads" in note for note in report.baseline.notes)


@pytest.mark.parametrize(
    ("machine", "versions", "says"),
    [
        (
            examples.MACHINE.model_copy(update={"cpu": "Another"}),
            examples.VERSIONS,
            "made with another processor: A CPU, here Another",
        ),
        (
            examples.MACHINE,
            {**examples.VERSIONS, "torch": "3.0.0"},
            "made with torch 2.13.0, here 3.0.0",
        ),
        (
            examples.MACHINE,
            {**examples.VERSIONS, "python": "3.12.1"},
            "made with python 3.11.9, here 3.12.1",
        ),
        (
            examples.MACHINE,
            {**examples.VERSIONS, "executorch": "1.6.0"},
            "made with executorch missing, here 1.6.0",
        ),
    ],
)
def test_elsewhere_accuracy_and_size_are_still_held(
    stored: Baseline, machine: Machine, versions: dict[str, str], says: str
) -> None:
    slow = [times("fp32", 100.0), times(rate=50.0, peak_bytes=900_000_000)]
    worse = [artifact("fp32"), worse_task(3.0).model_copy(update=sized(9_000_000))]
    report = hold(stored, run_of(worse, slow, machine, versions))
    assert {name for name, gate in gates(report).items() if not gate.passed} == {
        "task quality",
        "size",
    }
    assert not {"peak memory", "speed over fp32", "share of memory bandwidth"} & set(gates(report))
    assert report.baseline is not None
    assert report.baseline.notes[0] == says
    assert "speed and memory are not held to it; accuracy and size are" in report.baseline.notes


def test_a_patch_or_caliports_own_version_is_the_same_place(stored: Baseline) -> None:
    versions = {**examples.VERSIONS, "torch": "2.14.1+cpu", "caliport": "9.0"}
    memory = examples.MACHINE.model_copy(update={"memory_gb": 9.5})
    report = hold(stored, run_of(machine=memory, versions=versions))
    assert report.baseline is not None
    assert report.baseline.notes == ()
    assert "speed over fp32" in gates(report)


def test_other_prompts_leave_distributions_open_and_compare_means(stored: Baseline) -> None:
    other = ASKED.model_copy(update={"prompts": "c" * 64})
    found = gates(hold(stored, with_artifact(measured(kl=9.0).model_copy(update={"asked": other}))))
    for name in ("distribution", "favourite tokens"):
        assert found[name].passed
        assert not found[name].decided
        assert "made with other prompts" in found[name].reason
    assert found["task quality"].passed
    assert "(other examples)" in found["task quality"].reason
    lost = worse_task(30.0).model_copy(update={"asked": other})
    assert not gates(hold(stored, with_artifact(lost)))["task quality"].passed


def test_few_examples_are_undecided(stored: Baseline) -> None:
    """Scores that scatter widely around a small loss decide nothing."""
    task = artifact().task
    assert task is not None
    scores = tuple(s + (40 if i % 2 else -43) for i, s in enumerate(SCORES))
    mean = sum(scores) / len(scores)
    scattered = task.model_copy(update={"artifact_scores": scores, "artifact": mean})
    gate = gates(hold(stored, with_artifact(artifact(task=scattered))))["task quality"]
    assert gate.passed
    assert not gate.decided
    assert "40 examples are too few to say" in gate.reason


def test_a_loss_of_fp32_itself_is_put_down_to_calibration(stored: Baseline) -> None:
    found = worse_task(3.0)
    assert found.task is not None
    task = found.task.model_copy(update={"fp32": found.task.artifact})
    report = hold(stored, with_artifact(artifact(task=task)))
    assert report.artifacts[1].lost_at == "calibration"


def test_the_report_and_junit_show_it(stored: Baseline, tmp_path: Path) -> None:
    elsewhere = examples.MACHINE.model_copy(update={"cpu": "A <b>CPU</b>"})
    report = hold(stored, run_of([artifact("fp32"), worse_task(3.0)], machine=elsewhere))
    run = write_run(tmp_path, report)
    text = write_report(run / "reports").read_text(encoding="utf-8")
    assert "Held to the baseline <code>baselines/one.json</code>, made on A CPU." in text
    assert "another processor: A CPU, here A &lt;b&gt;CPU&lt;/b&gt;." in text
    assert "lost it at <b>quantization</b>" in text
    write_junit(report.artifacts, tmp_path / "junit.xml")
    cases = ElementTree.parse(tmp_path / "junit.xml").getroot().iter("testcase")
    failed = [case.get("name") for case in cases if case.find("failure") is not None]
    assert failed == ["baseline: task quality"]


def test_new_and_missing_artifacts_are_named(stored: Baseline) -> None:
    new = artifact().model_copy(update={"runtime": "executorch"})
    report = hold(stored, run_of([artifact("fp32"), new]))
    assert report.baseline is not None
    assert report.baseline.notes == (
        "describe in German: executorch int4: not in the baseline",
        "describe in German: onnx int4: in the baseline, not in this run",
    )
    assert gates(report) == {}


def test_parts_of_a_bundle_are_told_apart(tmp_path: Path) -> None:
    """Two compositions of one file, and the same composition folded, are three entries."""
    bundled = {"bundle": True, "path": "bundles/onnx-int4"}
    found = [
        artifact(),
        artifact().model_copy(update=bundled),
        artifact().model_copy(update={**bundled, "composition": "other"}),
    ]
    run = write_run(tmp_path, run_of(found)[0])
    assert set(baseline_of(reports_of(run)).artifacts) == {
        "describe in German: onnx int4",
        "describe in German: onnx int4 bundle",
        "other: onnx int4 bundle",
    }


def test_what_is_broken_is_no_baseline(tmp_path: Path, stored: Baseline) -> None:
    gates = [examples.gate("another", "lowering", False)]
    broken = artifact().model_copy(update={"gates": gates, "passed": False, "lost_at": "lowering"})
    run = write_run(tmp_path / "broken", run_of([broken])[0])
    with pytest.raises(
        InputError, match=r"onnx int4 failed \(another\); expected a run that passes"
    ):
        baseline_of(reports_of(run))
    regressed = hold(stored, with_artifact(worse_task(3.0)))
    run = write_run(tmp_path / "regressed", regressed)
    kept = baseline_of(reports_of(run)).artifacts["describe in German: onnx int4"]
    assert kept.task is not None
    assert kept.task.mean == pytest.approx(sum(SCORES) / len(SCORES) - 3, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "the file: Invalid JSON"),
        ("{}", "machine: Field required"),
        ('{"format": 2}', "format: Input should be 1"),
    ],
)
def test_a_damaged_baseline_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "one.json"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(f"{path}: {says}")) as caught:
        read_baseline(path, examples.MACHINE)
    assert "\n" not in str(caught.value)


def test_missing_files_say_what_writes_them(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such baseline; caliport baseline store writes one"):
        read_baseline(tmp_path / "gone.json", examples.MACHINE)
    with pytest.raises(InputError, match="no baseline in it"):
        read_baseline(tmp_path, examples.MACHINE)
    with pytest.raises(InputError, match=r"no parity\.json; expected a run directory or its rep"):
        reports_of(tmp_path)
