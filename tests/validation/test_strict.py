"""Reports, baselines and results of devices that were cut or edited are refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from caliport.android_harness import parity
from caliport.android_harness.runners.executorch import parse_llama_main
from caliport.android_harness.runners.job import (
    Answer,
    Job,
    Prompt,
    Result,
    Row,
    Timing,
    Turn,
    check_result,
)
from caliport.core.errors import InputError
from caliport.show.github import workflow_commands
from caliport.validation.baseline.baseline import baseline_of, read_baseline, reports_of
from caliport.validation.records.audit import (
    AngleCosines,
    AuditedMerge,
    AuditedModule,
    AuditReport,
    CompositionAudit,
    MergeError,
    PairOverlap,
)
from caliport.validation.records.budget import BudgetStage
from caliport.validation.records.latency import LatencyReport
from caliport.validation.records.record import RECORD_BYTES, Record, read_record
from caliport.validation.records.reports import ParityReport, QualityReport, read_if_there
from tests.fuzz.calls import FIGURES
from tests.validation import examples
from tests.validation.runs import run_of, write_run

ANSI = "\x1b[2J\x1b[31mred"


def audit() -> AuditReport:
    angles = AngleCosines(mean=0.5, highest=1.0, chance=0.25)
    module = AuditedModule(
        name="q_proj",
        layer=0,
        component="q_proj",
        shape=(4, 4),
        sum_norm=1.0,
        adapters={},
        overlaps=[PairOverlap(first="a", second="b", cosine=-0.5, columns=angles, rows=angles)],
        merges={"linear": MergeError(error=0.5, residual=0.5, kept=1.0)},
    )
    merge = AuditedMerge(merge="linear", verdict="far", error=0.5, kept=1.0, text="far")
    both = CompositionAudit(weights={"a": 0.5, "b": 0.5}, modules=[module], merges=[merge])
    return AuditReport(
        machine=examples.MACHINE, versions=examples.VERSIONS, compositions={"both": both}
    )


REPORTS: dict[str, Record] = {
    "parity": examples.parity(True),
    "quality": examples.quality(),
    "latency": examples.latency(),
    "audit": audit(),
}


def refused(kind: type[Record], path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(InputError) as caught:
        read_record(kind, path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert said.isprintable()
    assert len(said) < 1000
    return said


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value below a JSON value, and where it is."""
    yield path, node
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from places(value, (*path, key))


def put(root: Any, path: tuple[Any, ...], value: Any) -> str:
    """The document with another value at a place."""
    if not path:
        return json.dumps(value)
    changed = json.loads(json.dumps(root))
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return json.dumps(changed)


@pytest.mark.parametrize("name", REPORTS)
def test_no_place_of_a_report_takes_anything(name: str, tmp_path: Path) -> None:
    report, path = REPORTS[name], tmp_path / "report.json"
    root = report.model_dump(mode="json")
    assert read_record(type(report), path_of(path, json.dumps(root))) == report
    for place, value in places(root):
        wrong: list[Any] = [{"no": {"such": 1}}, [[[1]]]]
        if isinstance(value, bool):
            wrong += [0, "true", None]
        elif isinstance(value, int | float):
            wrong += [str(value), True, float("nan"), float("inf"), 10**400]
        elif isinstance(value, str):
            wrong += [5, True, "\ud800"]
        for other in wrong:
            refused(type(report), path, put(root, place, other))


def path_of(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", REPORTS)
def test_no_part_of_a_report_is_one(name: str, tmp_path: Path) -> None:
    text = REPORTS[name].model_dump_json()
    for size in range(0, len(text), max(1, len(text) // 40)):
        refused(type(REPORTS[name]), tmp_path / "cut.json", text[:size])
    for more in (f"{text}{text}", f"{text} x", f"\ufeff{text}", text.replace(":", ":[" * 10_000)):
        refused(type(REPORTS[name]), tmp_path / "more.json", more)
    twice = '{"machine": null, ' + text[1:]
    assert "stands twice" in refused(type(REPORTS[name]), tmp_path / "twice.json", twice)


FIRST = "artifacts.0."
STAGE = "budgets.0.stages.1."


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("parity", FIRST + "total.top1", 7),
        ("parity", FIRST + "total.top1", -0.1),
        ("parity", FIRST + "total.kl", -1),
        ("parity", FIRST + "total.perplexity", 0),
        ("parity", FIRST + "total.positions", 0),
        ("parity", FIRST + "bytes", -1),
        ("parity", FIRST + "bytes", 1.5),
        ("parity", FIRST + "bytes", 10**30),
        ("parity", FIRST + "examples", -1),
        ("parity", FIRST + "seconds", -1),
        ("parity", FIRST + "files", {"a": -1}),
        ("parity", FIRST + "composition", ANSI),
        ("parity", FIRST + "composition", "x" * 10**6),
        ("parity", FIRST + "runtime", "a\nb"),
        ("parity", FIRST + "task.fp32", 101),
        ("parity", FIRST + "task.fp32_scores", [1.0]),
        ("parity", FIRST + "task.interval", [1.0]),
        ("parity", FIRST + "generation", 2),
        ("parity", FIRST + "stock.matches", 5),
        ("parity", FIRST + "adapter.effect", -1),
        ("parity", "machine.cores", 0),
        ("parity", "machine.cores", 10**30),
        ("parity", "versions", {ANSI: "1"}),
        ("parity", STAGE + "stage", "unheard of"),
        ("parity", STAGE + "perplexity", -1),
        ("parity", STAGE + "by_position", [-1]),
        ("parity", "budgets.0.stages", []),
        ("quality", "metric", "bleu"),
        ("quality", "compositions.describe in German.examples", -1),
        ("quality", "compositions.describe in German.methods.0.rougeL", 101),
        ("quality", "compositions.describe in German.methods.0.passes", -1),
        ("quality", "compositions.describe in German.best", "joint"),
        ("quality", "compositions.describe in German.samples.0.outputs", {"joint": "A man."}),
        ("latency", FIRST + "threads", 0),
        ("latency", FIRST + "threads", 10**30),
        ("latency", FIRST + "decode_rate.median", 0),
        ("latency", FIRST + "decode_rate.median", 2.25),
        ("latency", FIRST + "decode_rate.values", []),
        ("latency", FIRST + "decode_rate.values", [1.5, 2.0]),
        ("latency", FIRST + "decode_rate.values", [1.5, 2.0, -2.5]),
        ("latency", FIRST + "decode_rate.interval", [2.5, 1.5]),
        ("latency", FIRST + "decode_rate.level", 2),
        ("latency", FIRST + "peak_bytes", -1),
        ("latency", FIRST + "bytes", 5),
        ("latency", "cores", [-1]),
        ("latency", "seed", 10**400),
        ("audit", "compositions.both.modules.0.merges", {}),
        ("audit", "compositions.both.modules.0.layer", -1),
        ("audit", "compositions.both.modules.0.overlaps.0.cosine", 2),
        ("audit", "compositions.both.merges.0.verdict", "fine"),
    ],
)
def test_what_no_run_could_reach_is_refused(
    name: str, field: str, value: object, tmp_path: Path
) -> None:
    report = REPORTS[name]
    keys = [int(key) if key.isdecimal() else key for key in field.split(".")]
    text = put(report.model_dump(mode="json"), tuple(keys), value)
    said = refused(type(report), tmp_path / "report.json", text)
    assert str(keys[0]) in said or "Value error" in said


GATE = "artifacts.1.gates.0."


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({FIRST + "passed": False}, "passed is false, but every gate passed"),
        ({"artifacts.1.passed": True}, "passed is true, but the gate prefill failed"),
        ({"artifacts.1.passed": True, "artifacts.1.lost_at": None}, "the gate prefill failed"),
        ({"artifacts.1.lost_at": "size"}, "lost_at is size, but no gate that failed says so"),
        ({"artifacts.1.lost_at": None}, "lost_at is None, but"),
        ({FIRST + "lost_at": "lowering"}, "lost_at is lowering, but"),
        ({GATE + "passed": True}, "passed is true, but 2.5 was found and at most 0.01 passes"),
        ({GATE + "limit": 3.0}, "passed is false, but 2.5 was found and at most 3 passes"),
        ({GATE + "passed": True, GATE + "limit": 3.0}, "passed is false, but every"),
        (
            {
                "artifacts.1.passed": True,
                "artifacts.1.lost_at": None,
                GATE + "passed": True,
                GATE + "found": 0,
            },
            "the gate prefill found 0, but the measure is 2.5",
        ),
        ({GATE + "passed": True, GATE + "found": None}, "passed is true, but nothing was found"),
        ({GATE + "passed": True, GATE + "decided": False}, "decided is false, but"),
        ({FIRST + "prefill.kl": 0.5}, "the gate prefill found 0.001, but the measure is 0.5"),
        ({FIRST + "gates.1.found": -9}, "passed is true, but -9 was found and at least -5 passes"),
        ({FIRST + "gates.1.found": -2}, "the gate task quality found -2, but the measure is -1"),
        ({FIRST + "task.interval": [-6, 0]}, "not that of its interval"),
        ({FIRST + "task.interval": [-7, -6]}, "not that of its interval"),
        ({FIRST + "task.interval": [0, -2]}, "the interval ends before it begins"),
        ({FIRST + "task.difference": 1}, "difference is 1, but the scores differ by -1"),
        ({FIRST + "task.fp32_scores": [1], FIRST + "task.artifact_scores": [1]}, "mean of its"),
        ({FIRST + "bytes": 5}, "bytes is 5, but its files have 2900000"),
    ],
    ids=str,
)
def test_an_edited_verdict_is_refused(edits: dict[str, Any], says: str, tmp_path: Path) -> None:
    root = examples.parity(True).model_dump(mode="json")
    root["artifacts"][1]["gates"] = root["artifacts"][1]["gates"][:1]
    for field, value in edits.items():
        keys = tuple(int(key) if key.isdecimal() else key for key in field.split("."))
        root = json.loads(put(root, keys, value))
    assert says in refused(ParityReport, tmp_path / "parity.json", json.dumps(root))


def test_artifacts_timed_together_have_as_many_rounds(tmp_path: Path) -> None:
    report = examples.latency()
    other = report.artifacts[0].model_dump(mode="json")
    rate = other["decode_rate"]
    rate |= {"values": [1.5, 2.5], "low": 1.5, "high": 2.5}
    root = report.model_dump(mode="json")
    root["artifacts"].append(other)
    said = refused(LatencyReport, tmp_path / "latency.json", json.dumps(root))
    assert "decode_rate: 2 values of one artifact and 3 of another" in said


@pytest.mark.parametrize(
    "edit",
    [
        {"kl": -1},
        {"top1": 7},
        {"bytes": -1},
        {"bytes": True},
        {"prompts": ANSI},
        {"task": {"metric": "rougeL", "mean": 1e9, "interval": [0, 1], "scores": []}},
        {"task": {"metric": "rougeL", "mean": 9, "interval": [8, 9], "scores": [1, 3]}},
        {"speed": {"threads": 0, "prompt_tokens": 1, "new_tokens": 1, "relative": None}},
    ],
    ids=str,
)
def test_an_edited_baseline(edit: dict[str, Any], tmp_path: Path) -> None:
    reports = reports_of(write_run(tmp_path / "run", *run_of()))
    root = baseline_of(reports).model_dump(mode="json")
    path = path_of(tmp_path / "baseline.json", json.dumps(root))
    assert read_baseline(path, examples.MACHINE)[1].artifacts
    next(iter(root["artifacts"].values())).update(edit)
    path.write_text(json.dumps(root))
    with pytest.raises(InputError, match="expected what caliport baseline store writes"):
        read_baseline(path, examples.MACHINE)


@pytest.mark.parametrize("how", ["directory", "pipe", "zero", "loop", "nowhere", "sparse", "latin"])
def test_a_report_is_a_file_of_bounded_size(how: str, tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    if how == "directory":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "sparse":
        with path.open("wb") as stream:
            stream.truncate(RECORD_BYTES + 1)
    elif how == "latin":
        path.write_bytes(b'{"a": "\xe9"}')
    else:
        path.symlink_to({"zero": "/dev/zero", "loop": "quality.json"}.get(how, "nowhere"))
    with pytest.raises(InputError) as caught:
        read_if_there(QualityReport, path)
    assert str(caught.value).startswith(str(path))
    with pytest.raises(InputError):
        read_baseline(path, examples.MACHINE)


ROW = Row(ids=(2, 1), logits=(1.0, 0.5), mean=0.1, logsumexp=2.5)
RESULT = Result(
    runner="caliport-onnx 1",
    runtime_version="1.31.0",
    threads=1,
    cores=(0, 1),
    load_seconds=0.5,
    peak_bytes=300,
    loaded_bytes=200,
    idle_bytes=100,
    answers=(Answer(tokens=(3, 4), rows=(ROW, ROW)),),
    turns=(Turn(prompt_tokens=4, first_token_seconds=0.1, step_seconds=(0.01, 0.02)),),
)
JOB = Job(
    runtime="onnx",
    directory="",
    threads=1,
    cores=(0, 1),
    max_new_tokens=2,
    top=2,
    prompts=(Prompt(tokens=(1,), targets=(3, 4)),),
    timing=Timing(prompt_lengths=(4,), new_tokens=3, repetitions=1),
)


def judged(text: str) -> None:
    """Read what a runner wrote as a run of ours does."""
    from caliport.android_harness import run

    device = SimpleNamespace(serial="0123")
    held = SimpleNamespace(device=device, read=lambda _: text)
    done = SimpleNamespace(code=0, err="", out="")
    found = run._result(cast(Any, held), JOB, cast(Any, done))
    ran, host = (
        SimpleNamespace(result=found, device=device),
        SimpleNamespace(logits=[np.zeros((2, 5), np.float32)]),
    )
    parity._check_rows(cast(Any, ran), cast(Any, host))


def row(**changes: Any) -> dict[str, Any]:
    return {"answers.0.rows.1": {**ROW.model_dump(mode="json"), **changes}}


@pytest.mark.parametrize(
    "change",
    [
        row(ids=[-1, 2]),
        row(ids=[2, 5]),
        row(ids=[]),
        row(ids=[], logits=[]),
        row(ids=[2, 2]),
        row(ids=[2]),
        row(ids=[2], logits=[1.0]),
        row(ids=[2, 1, 0], logits=[1.0, 0.5, 0.2]),
        row(logits=[1.0]),
        row(logits=[0.5, 1.0]),
        row(logits=[float("nan"), 1.0]),
        row(logits=[1e300, 1.0]),
        row(logsumexp=-1e9),
        row(mean=1e9),
        {"answers.0.tokens": [-1]},
        {"answers.0.tokens": [5]},
        {"answers.0.tokens": None},
        {"answers.0.tokens": [10**30]},
        {"answers.0.rows": []},
        {"answers": []},
        {"threads": 10**30},
        {"threads": 10**6},
        {"threads": 0},
        {"cores": [-1]},
        {"cores": [10**30]},
        {"cores": [7]},
        {"load_seconds": -1},
        {"load_seconds": 0},
        {"load_seconds": float("inf")},
        {"peak_bytes": -1},
        {"runner": ANSI},
        {"runner": "x" * 10**6},
        {"runtime_version": "1\n2"},
        {"turns": []},
        {"turns.0.prompt_tokens": 5},
        {"turns.0.step_seconds": [0.1]},
        {"turns.0.step_seconds": [0, 0]},
        {"turns.0.first_token_seconds": -1},
        {"more": 1},
    ],
    ids=str,
)
def test_what_a_runner_cannot_have_found_is_one_line(change: dict[str, Any]) -> None:
    root = RESULT.model_dump(mode="json")
    judged(json.dumps(root))
    ((field, value),) = change.items()
    keys = tuple(int(key) if key.isdecimal() else key for key in field.split("."))
    with pytest.raises(InputError) as caught:
        judged(put(root, keys, value))
    said = str(caught.value)
    assert said.startswith("device 0123: runner: ")
    assert said.isprintable()
    assert len(said) < 500


def test_a_result_that_nobody_timed_may_have_turns() -> None:
    check_result(RESULT, JOB.model_copy(update={"timing": None}), "here")


@pytest.mark.parametrize("field", FIGURES)
@pytest.mark.parametrize("value", [None, "4", True, -1, 1e400, 10**400, 10**30, [], {}], ids=str)
def test_figures_of_llama_main_that_are_none(field: str, value: object) -> None:
    line = json.dumps({**FIGURES, field: value})
    assert parse_llama_main(f"p a\nPyTorchObserver {json.dumps(FIGURES)}\n", "p").decoded_tokens
    for said in (line, line[:30], "[" * 100_000, f"{line[:-1]}, {line[1:]}"[:-9]):
        with pytest.raises(InputError, match="llama_main: found"):
            parse_llama_main(f"p a\nPyTorchObserver {said}\n", "p")


def test_commands_for_github_are_one_printable_line() -> None:
    failed = examples.parity(True).artifacts[1]
    gate = failed.gates[0].model_copy(update={"reason": f"{ANSI}\r\n::error::no 100%"})
    lines = list(workflow_commands([failed.model_copy(update={"gates": [gate]})], Path("x")))
    assert len(lines) == 1
    assert lines[0].isprintable()
    assert lines[0].endswith("%0A::error::no 100%25")


def test_records_in_a_list_are_read_as_strictly(tmp_path: Path) -> None:
    stage = examples.budget().stages[1].model_dump(mode="json")
    path = path_of(tmp_path / "stages.json", json.dumps([stage]))
    assert read_record(list[BudgetStage], path) == [examples.budget().stages[1]]
    path.write_text(json.dumps([{**stage, "perplexity": -1}]))
    with pytest.raises(InputError, match=r"0\.perplexity: Input should be greater than 0"):
        read_record(list[BudgetStage], path)
