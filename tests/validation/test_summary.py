"""What a job is told: the Markdown summary, annotations and outputs. Reports are by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from caliport.core.errors import InputError
from caliport.show.github import publish, workflow_commands
from caliport.validation.records.gate import Gate
from caliport.validation.records.reports import BaselineUse, ParityReport
from caliport.validation.report.summary import LONGEST, plain, summary
from tests.validation import examples
from tests.validation.runs import artifact, run_of, times


def report_of(*gates: Gate, count: int = 1) -> ParityReport:
    """A sound artifact, and ``count`` with these gates besides."""
    found = examples.artifact("onnx", "int4", list(gates))
    others = [found.model_copy(update={"composition": f"both {n}"}) for n in range(count)]
    return ParityReport(
        machine=examples.MACHINE,
        versions=examples.VERSIONS,
        artifacts=[artifact("fp32"), *others],
    )


def broken(name: str = "decode") -> Gate:
    return examples.gate(name, "lowering", passed=False)


def test_verdict_first_then_a_table_with_failures_on_top() -> None:
    parity, latency, _ = run_of([artifact("fp32"), artifact()])
    lost = artifact("int8", gates=[broken()], passed=False, lost_at="lowering")
    parity = parity.model_copy(update={"artifacts": [*parity.artifacts, lost]})
    lines = summary(parity, latency.artifacts).splitlines()
    assert lines[0] == "## ✕ 1 of 3 artifacts failed"
    rows = [line for line in lines if line.startswith("|")]
    assert rows[0].count("|") == rows[1].count("|") == 8
    assert [re.sub(r"\\", "", row.split("|")[1]).strip() for row in rows[2:]] == [
        "describe in German: onnx int8",
        "describe in German: onnx fp32",
        "describe in German: onnx int4",
    ]
    assert "✕ lost at lowering" in rows[2]
    assert "✓ pass" in rows[4]
    assert rows[4].endswith("| 2.9 MB | +0.00 | 0.004 | 98.5% | 2.00 × |")
    assert rows[3].endswith("| – |"), "fp32 is compared with nothing"
    assert "### Failed" in lines
    assert any("lost at **lowering**" in line for line in lines)
    assert any(line.startswith("  - decode: why decode") for line in lines)


def test_each_composition_has_a_line_on_what_was_lost_where() -> None:
    text = summary(examples.parity(failing=True))
    assert (
        "### Accuracy loss by stage\n\n- **describe in German**: Most was lost at artifact," in text
    )
    assert text.index("| artifact |") < text.index("### Accuracy") < text.index("### Failed")
    assert "### Accuracy" not in summary(report_of())


def test_undecided_gates_have_a_place_of_their_own() -> None:
    text = summary(report_of(examples.gate("task quality", "quantization", decided=False)))
    assert text.startswith("## ? No gate failed\n")
    assert "? undecided" in text
    section = text[text.index("### Undecided") :]
    assert "  - task quality: why task quality" in section
    assert "### Failed" not in text


def test_the_baseline_and_what_was_not_held_to_it_are_named() -> None:
    use = BaselineUse(
        file="baselines/a_b.json",
        machine=examples.MACHINE,
        versions=examples.VERSIONS,
        notes=("speed and memory are not held to it",),
    )
    text = summary(report_of().model_copy(update={"baseline": use}))
    assert r"Held to baselines/a\_b.json, made on A CPU with 2 cores." in text
    assert "- speed and memory are not held to it" in text


def test_text_is_never_markup() -> None:
    found = plain("a | b\n<script> `x` *y* _z_ [l](u) @team & #1 \\")
    assert found == r"a \| b &lt;script&gt; \`x\` \*y\* \_z\_ \[l\](u) &#64;team &amp; \#1 \\"
    text = summary(report_of(broken()))
    assert "<script" not in text
    assert "\x0b" not in text


def test_it_always_fits_a_comment() -> None:
    """Hundreds of artifacts with reasons in a script of three bytes a letter."""
    gate = broken().model_copy(update={"reason": "漢" * 5000})
    text = summary(report_of(gate, count=300))
    assert len(text.encode()) < LONGEST
    assert text.startswith("## ✕ 300 of 301 artifacts failed")
    left_out = re.search(r"… and (\d+) more lines; the report has them all\.\n$", text)
    assert left_out is not None
    whole = summary(report_of(broken()))
    assert "more lines" not in whole


def test_one_annotation_an_artifact_with_all_its_reasons(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    unsure = examples.gate("task quality", "quantization", decided=False)
    gates = [broken("prefill"), broken("decode").model_copy(update={"reason": "50 %\nof it"})]
    failed, open_ = report_of(*gates).artifacts[1], report_of(unsure).artifacts[1]
    lines = list(workflow_commands([failed, open_], tmp_path / "recipes" / "a,b.yaml"))
    assert len(lines) == 2
    assert lines[0].startswith(
        "::error file=recipes/a%2Cb.yaml,title=both 0%3A onnx int4%3A lost at lowering::prefill: "
    )
    assert lines[0].endswith("%0Adecode: 50 %25%0Aof it")
    assert lines[1].startswith(
        "::warning file=recipes/a%2Cb.yaml,title=both 0%3A onnx int4%3A undecided::task quality: "
    )
    assert not any("\n" in line for line in lines)


def test_no_more_annotations_than_are_shown(tmp_path: Path) -> None:
    source = tmp_path / "elsewhere" / "manifest.json"
    ten = list(workflow_commands(report_of(broken(), count=10).artifacts, source))
    assert len(ten) == 10
    assert ten[9].startswith(f"::error file={source},title=both 9%3A onnx int4%3A lost at")
    many = list(workflow_commands(report_of(broken(), count=25).artifacts, source))
    assert len(many) == 10
    assert "title=16 more artifacts::both 9: onnx int4, both 10" in many[9]


def test_within_a_job_it_is_told_and_elsewhere_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"):
        monkeypatch.delenv(name, raising=False)
    report, reports = report_of(broken()), tmp_path / "reports"
    publish(report, [times()], tmp_path / "r.yaml", reports)
    text = (reports / "summary.md").read_text()
    assert text == summary(report, [times()])
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"):
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "GITHUB_STEP_SUMMARY").write_text("before\n")
    publish(report, [times()], tmp_path / "r.yaml", reports)
    assert (tmp_path / "GITHUB_STEP_SUMMARY").read_text() == f"before\n{text}"
    outputs = (tmp_path / "GITHUB_OUTPUT").read_text().splitlines()
    assert outputs == ["verdict=fail", f"reports={reports}"]
    assert capsys.readouterr().out.startswith("::error file=")
    publish(report_of(), [], tmp_path / "r.yaml", None)
    assert (tmp_path / "GITHUB_OUTPUT").read_text().splitlines()[2:] == ["verdict=pass"]
    assert capsys.readouterr().out == ""


def test_a_summary_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    with pytest.raises(InputError, match=r"GITHUB_STEP_SUMMARY is .*: cannot be written: Is a dir"):
        publish(report_of(), [], tmp_path / "r.yaml", None)
