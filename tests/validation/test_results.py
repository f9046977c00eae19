from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError

from caliport.core.errors import InputError
from caliport.validation.records.latency import LatencyReport
from caliport.validation.records.reports import (
    ParityReport,
    Point,
    QualityReport,
    environment,
    file_sizes,
    read_result,
    this_machine,
    write_result,
)
from caliport.validation.report.junit import write_junit
from tests.validation import examples


@pytest.mark.parametrize("report", [examples.quality(), examples.parity(True), examples.latency()])
def test_reports_come_back_as_they_were_written(
    tmp_path: Path, report: QualityReport | ParityReport | LatencyReport
) -> None:
    path = tmp_path / "reports" / "some.json"
    write_result(report, path)
    assert read_result(type(report), path) == report
    assert [entry.name for entry in path.parent.iterdir()] == ["some.json"]


def damage(text: str, kind: str) -> str:
    if kind == "cut":
        return text[:100]
    data = json.loads(text)
    if kind == "unknown":
        data["artifacts"][0]["speed"] = 1
    elif kind == "missing":
        del data["artifacts"][1]["gates"]
    elif kind == "type":
        data["artifacts"][0]["bytes"] = "many"
    return json.dumps(data)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "the file: Invalid JSON"),
        ("unknown", "artifacts.0.speed: Extra inputs are not permitted"),
        ("missing", "artifacts.1.gates: Field required"),
        ("type", "artifacts.0.bytes: Input should be a valid integer"),
    ],
)
def test_a_damaged_report_is_one_line_with_the_field(
    tmp_path: Path, kind: str, message: str
) -> None:
    path = tmp_path / "parity.json"
    path.write_text(damage(examples.parity().model_dump_json(), kind))
    with pytest.raises(InputError, match=message) as caught:
        read_result(ParityReport, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_report_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; run the stage that writes it"):
        read_result(ParityReport, tmp_path / "parity.json")


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "reports").write_text("a file")
    with pytest.raises(InputError, match="reports is a file, expected a directory"):
        write_result(examples.parity(), tmp_path / "reports" / "parity.json")


def test_numbers_that_json_cannot_hold_are_refused() -> None:
    with pytest.raises(ValidationError, match="finite number"):
        Point(step=1, loss=float("nan"))


def test_machine_and_versions_are_this_ones(tmp_path: Path) -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory_gb > 0
    assert machine.cpu
    assert {"python", "torch", "transformers"} <= set(environment())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.bin").write_bytes(b"12345")
    assert file_sizes(tmp_path) == {"sub/a.bin": 5}


def test_junit_counts_failures_and_escapes(tmp_path: Path) -> None:
    path = tmp_path / "reports" / "junit.xml"
    report = examples.parity(failing=True)
    report.artifacts[0].gates.append(examples.gate("unsure", "quantization", decided=False))
    write_junit(report.artifacts, path)
    suites = ElementTree.parse(path).getroot().findall("testsuite")
    assert [suite.get("failures") for suite in suites] == ["0", "2"]
    assert [suite.get("tests") for suite in suites] == ["3", "2"]
    failure = suites[1].findall("testcase")[0].find("failure")
    assert failure is not None
    message = failure.get("message") or ""
    assert "lost at lowering: why prefill <script>alert('ß')</script> & $x^2$" in message
    assert failure.text == "KL in nats: limit 0.01, found 2.5"
    assert suites[0].findall("testcase")[2].findtext("system-out", "").startswith("why unsure")
