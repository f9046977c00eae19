"""Two runs side by side. The reports are small and by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from caliport.cli.compare import show_comparison
from caliport.core.errors import InputError
from caliport.validation.records.reports import ArtifactResult
from caliport.validation.report.compare import Comparison, compare_runs, write_page
from caliport.validation.report.compare_figures import Figure
from tests.validation import examples
from tests.validation.runs import (
    ASKED,
    SCORES,
    artifact,
    lost,
    run_of,
    scoring,
    sized,
    times,
    write_run,
)
from tests.validation.test_report import Page


@pytest.fixture
def before(tmp_path: Path) -> Path:
    return write_run(tmp_path / "before", *run_of())


def figures(comparison: Comparison, index: int = 1) -> dict[str, Figure]:
    return {figure.label: figure for figure in comparison.artifacts[index].figures}


def scored(change: float, scatter: float = 0.0) -> ArtifactResult:
    """An artifact whose scores changed, by more or less from example to example."""
    task = artifact().task
    assert task is not None
    scores = tuple(s + change + (scatter if i % 2 else -scatter) for i, s in enumerate(SCORES))
    return artifact(task=task.model_copy(update=scoring(scores)))


def test_the_same_run_twice_differs_in_nothing(
    before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare_runs(before, write_run(tmp_path / "after", *run_of()))
    assert found.names == ("before", "after")
    assert found.differences == found.warnings == ()
    assert {f.tone for pair in found.artifacts for f in pair.figures} == {"same"}
    assert [pair.gates for pair in found.artifacts] == [(), ()]
    assert not any(pair.changed for pair in found.methods)
    labels = set(figures(found))
    assert labels == {
        "ROUGE-L",
        "KL from fp32, nats",
        "top-1 agreement with fp32",
        "size",
        "load",
        "first token",
        "decode, tokens/s",
        "decode over fp32's",
        "peak memory",
    }
    show_comparison(found)
    assert "before: Accuracy survived" in capsys.readouterr().out


def test_what_changed_is_said_with_its_direction(before: Path, tmp_path: Path) -> None:
    worse = scored(-3.0).model_copy(
        update={
            **lost(),
            **sized(3_000_000),
            "parts": {"linear": 2_100_000, "rest": 900_000},
        }
    )
    latencies = [times("fp32", 100.0), times(rate=300.0, peak_bytes=90_000_000)]
    after = write_run(tmp_path / "after", *run_of([artifact("fp32"), worse], latencies, loss=1.0))
    found = compare_runs(before, after)
    assert [h.state for h in found.headlines] == ["pass", "fail"]
    pair = found.artifacts[1]
    assert pair.verdicts == ("pass", "fail")
    assert pair.gates == (("prefill", "pass", "fail", worse.gates[0].reason),)
    shown = figures(found)
    assert shown["ROUGE-L"].tone == "worse"
    assert shown["ROUGE-L"].change == "-3.00 (-3.00 to -3.00)"
    assert (shown["size"].change, shown["size"].tone) == ("+3.4%", "worse")
    assert (shown["size of linear"].before, shown["size of linear"].after) == ("2 MB", "2.1 MB")
    assert "size of rest" not in shown
    assert shown["decode, tokens/s"].tone == "better"
    assert shown["decode, tokens/s"].change.startswith("+50.0% (noise ")
    assert (shown["decode over fp32's"].before, shown["decode over fp32's"].after) == (
        "2.00 (2.00 to 2.00)",
        "3.00 (3.00 to 3.00)",
    )
    assert shown["peak memory"].change == "+28.6%"
    assert [p.name for p in found.methods if p.changed] == ["describe in German: LC++"]


def test_a_difference_within_noise_is_called_that(before: Path, tmp_path: Path) -> None:
    latencies = [times("fp32", 100.0), times(rate=205.0, noise=0.2)]
    run = run_of([artifact("fp32"), scored(-0.2, scatter=8.0)], latencies)
    shown = figures(compare_runs(before, write_run(tmp_path / "after", *run)))
    assert shown["decode, tokens/s"].tone == "noise"
    assert shown["ROUGE-L"].tone == "noise"
    uneasy = times(rate=400.0).model_copy(update={"noise": "uneasy"})
    run = run_of(latencies=[times("fp32", 100.0), uneasy])
    shown = figures(compare_runs(before, write_run(tmp_path / "uneasy", *run)))
    assert shown["decode, tokens/s"].tone == "noisy"
    assert shown["decode, tokens/s"].change == "+100.0%"
    run = run_of(latencies=[times("fp32", 100.0), times(rate=400.0, threads=4)])
    shown = figures(compare_runs(before, write_run(tmp_path / "threads", *run)))
    assert shown["decode, tokens/s"].tone == "other"


def test_other_machines_versions_and_prompts_are_on_top(before: Path, tmp_path: Path) -> None:
    other = ASKED.model_copy(update={"prompts": "c" * 64})
    parts = [artifact("fp32", asked=other), artifact(asked=other)]
    machine = examples.MACHINE.model_copy(update={"cpu": "Another", "cores": 4})
    versions = {"python": "3.11.9", "torch": "2.14.0", "peft": "0.21"}
    after = write_run(tmp_path / "after", *run_of(parts, machine=machine, versions=versions))
    found = compare_runs(before, after)
    assert found.differences == (
        ("processor", "A CPU", "Another"),
        ("cores", "2", "4"),
        ("peft", "–", "0.21"),
        ("torch", "2.13.0", "2.14.0"),
    )
    assert [warning.partition(" are not")[0] for warning in found.warnings] == [
        "The machines",
        "The prompts",
    ]


def test_artifacts_of_one_run_alone_and_missing_reports(before: Path, tmp_path: Path) -> None:
    """Without latency and quality; the reports directory itself may be named."""
    new = artifact().model_copy(update={"runtime": "executorch"})
    after = write_run(tmp_path / "after", run_of([artifact("fp32"), new])[0])
    found = compare_runs(before, after / "reports")
    assert {pair.name: pair.verdicts for pair in found.artifacts} == {
        "describe in German: onnx fp32": ("pass", "pass"),
        "describe in German: executorch int4": ("missing", "pass"),
        "describe in German: onnx int4": ("pass", "missing"),
    }
    assert figures(found, 1)["size"] == Figure("size", "–", "2.9 MB")
    assert figures(found, 0)["decode, tokens/s"].after == "–"
    with pytest.raises(InputError, match=r"no parity\.json"):
        compare_runs(before, tmp_path)


def test_budgets_stand_stage_by_stage(before: Path, tmp_path: Path) -> None:
    """The first run has none, as one of an earlier version."""
    parity = run_of()[0].model_copy(update={"budgets": [examples.budget()]})
    after = write_run(tmp_path / "after", parity)
    found = compare_runs(before, after).budgets["describe in German, ROUGE-L"]
    assert [(pair.stage, pair.form) for pair in found[2:5]] == [
        ("calibration", ""),
        ("quantized eager", "ExecuTorch int4"),
        ("artifact", "ExecuTorch int4"),
    ]
    assert (found[0].kl, found[0].task) == (("–", "–"), ("–", "8.50"))
    worse = parity.model_copy(update={"budgets": [examples.budget(failing=True)]})
    shown = compare_runs(after, write_run(tmp_path / "worse", worse))
    (pairs,) = shown.budgets.values()
    assert [p.form for p in pairs if p.kl[0] != p.kl[1]] == ["ONNX int4"]
    assert (pairs[-1].kl, pairs[-1].task) == (("0", "2.5"), ("90.70", "8.10"))


def test_the_page_is_sound_and_self_contained(before: Path, tmp_path: Path) -> None:
    worse = scored(-3.0).model_copy(update=lost())
    machine = examples.MACHINE.model_copy(update={"cpu": examples.ATTACK})
    parity, *others = run_of([artifact("fp32"), worse], machine=machine)
    parity = parity.model_copy(update={"budgets": [examples.budget()]})
    after = write_run(tmp_path / "after", parity, *others)
    write_page(compare_runs(before, after), tmp_path / "compare.html")
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert page.tags["script"] == page.tags["iframe"] == 0
    assert "@import" not in text
    assert not re.search(r"url\(", text)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert "prefers-color-scheme: dark" in text
    assert '<meta name="viewport" content="width=device-width' in text
    assert "&lt;script&gt;" in text
    assert text.index("Machine and versions") < text.index("<h2>Artifacts</h2>")
    assert text.count("<details open>") == 2
    assert '<td class="n" data-label="KL, after">1.7</td>' in text
    assert '<td class="n worse" data-label="Change">-3.00 (-3.00 to -3.00) worse</td>' in text
