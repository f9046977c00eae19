"""The real runtimes, over a real adb, say on the device what they say here; or it is noticed."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from caliport.android_harness import latency, texts
from caliport.android_harness.device.adb import Device
from caliport.android_harness.device.facts import Facts, facts
from caliport.android_harness.device.session import session
from caliport.android_harness.parity import check, estimated, host_reference, job_of
from caliport.android_harness.run import Ran, run_job
from caliport.android_harness.runners.kinds import JobRunner, read_runner, row_of
from caliport.android_harness.toolchain.build import PROGRAM, build_runner
from caliport.cli.app import app
from caliport.core.checkpoints import load_tokenizer
from caliport.core.errors import InputError
from caliport.export.artifact import Artifact
from caliport.export.reference.folded import eager
from caliport.on_devices.where import Where, runner_for
from caliport.validation.api import Validation, make_references
from caliport.validation.baseline.baseline import read_baseline
from caliport.validation.baseline.regression import RegressionLimits, hold_times, hold_to
from caliport.validation.evaluation.evaluation import make_evaluation
from caliport.validation.evaluation.measures import kl_divergence
from caliport.validation.records.device import DeviceUsed
from caliport.validation.records.latency import DeviceConditions, LatencyReport
from caliport.validation.records.record import Machine
from caliport.validation.records.reports import (
    JUNIT,
    LATENCY,
    PARITY,
    ParityReport,
    read_result,
    write_result,
)
from caliport.validation.report.junit import write_junit
from caliport.validation.report.page import write_report
from caliport.validation.report.summary import summary
from caliport.validation.runners.open import Execution
from tests.android.daemon import PROJECT, Daemon
from tests.android.standins import THERMAL, properties
from tests.conftest import TEXTS
from tests.exports import to_executorch, to_onnx
from tests.validation.runs import run_of, times, write_run

FORMS = [("onnx", "int8"), ("onnx", "int4"), ("executorch", "int4")]
LABEL = "Linux stand-in: times are no results"


@pytest.fixture(scope="module")
def runner() -> Path:
    return build_runner("host", PROJECT / "build/host", PROJECT / "build/runner")


@pytest.fixture(scope="module")
def artifacts(
    base_dir: Path, adapter_dirs: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """As in ``FORMS``."""
    root = tmp_path_factory.mktemp("artifacts")
    lower = {"onnx": to_onnx, "executorch": to_executorch}
    return [
        lower[runtime](
            base_dir,
            root / f"{runtime}-{precision}",
            adapter=adapter_dirs[0],
            precision=precision,
            context=96,
        )
        for runtime, precision in FORMS
    ]


@pytest.fixture
def linux(phones: list[Daemon]) -> Iterator[list[Daemon]]:
    """Two devices that are no Android; the second says that it has another processor."""
    for daemon in phones[:2]:
        properties(daemon, release="")
    yield phones[:2]
    for daemon in phones[:2]:
        properties(daemon)
        (daemon.facts / "dumpsys-thermalservice").write_text(THERMAL, encoding="utf-8")
        for name in ("bin/settings", "dumpsys-power"):
            (daemon.facts / name).unlink(missing_ok=True)


def run(*words: object) -> int:
    """The exit code of ``caliport``."""
    return int(app([str(word) for word in words], standalone_mode=False) or 0)


def test_artifacts_say_on_devices_what_they_say_here(
    linux: list[Daemon],
    artifacts: list[Path],
    runner: Path,
    base_dir: Path,
    adapter_dirs: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    lines = [json.dumps({"input": text, "output": TEXTS[0]}) for text in TEXTS]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    code = run(
        *("device", "validate", *artifacts, "--base", base_dir, "--adapter", adapter_dirs[0]),
        *("--prompts", prompts, "--threads", 1, "--runner", runner, "--out", out),
        *(word for daemon in linux for word in ("--serial", daemon.address)),
    )
    assert code == 0
    report = read_result(ParityReport, out / PARITY)
    expected = [(*form, daemon.address) for form in FORMS for daemon in linux]
    found = report.devices
    assert [(r.runtime, r.precision, r.device.serial) for r in found] == expected
    for result in found:
        assert result.identical == result.examples == len(TEXTS)
        assert result.exact is (result.device.serial == linux[0].address)
        assert result.runtime_version == result.host_version
        assert result.measures is not None
        assert result.measures.max_abs < 1e-6
        assert {gate.stage for gate in result.gates} == {"device"}
        assert {"greedy tokens", "farthest position", "task quality"} <= {
            gate.name for gate in result.gates
        }
        assert result.task is not None
        assert result.task.host == result.task.device
        assert result.device.label == LABEL
        assert len(result.runner_sha256) == 64
    for budget in report.budgets:
        assert [stage.stage for stage in budget.stages][-2:] == ["artifact", "device"]
        assert LABEL in budget.stages[-1].label
    suites = ElementTree.parse(out / JUNIT).getroot().findall("testsuite")
    assert len(suites) == len(found)
    assert all(LABEL in str(suite.get("name")) for suite in suites)
    assert "passed on 6 runs on a device" in (out / "report.html").read_text()
    assert LABEL in capsys.readouterr().out


def test_another_answer_is_lost_at_the_device(
    phone: Daemon,
    artifacts: list[Path],
    runner: Path,
    base_dir: Path,
    adapter_dirs: list[Path],
    tmp_path: Path,
) -> None:
    ours, other = map(Artifact.read, artifacts[:2])
    asked = make_references(Validation(ours, base_dir), adapter_dirs[0])
    host = host_reference(
        Execution(ours),
        asked.evaluation,
        expected=asked.expected(ours),
        composition="both",
        metric="rougeL",
    )
    # A runner that says the first token of the first answer wrong, after all its logits.
    wrong = tmp_path / "wrong"
    shutil.copytree(runner, wrong)
    assert host.answers.generated is not None
    token = host.answers.generated[0][0]
    (wrong / "run").write_text(
        f'#!/bin/sh\n"${{0%/*}}/{PROGRAM}" "$@" && '
        f'sed -i \'s/"tokens":\\[{token}/"tokens":[{(token + 1) % 384}/\' "$2"\n'
    )
    (wrong / "run").chmod(0o755)
    job, sound = job_of(host), read_runner(runner)
    with session(Device(phone.address)) as held:
        swapped = run_job(held, job, other, sound, 60)
        lied = run_job(held, job, ours, JobRunner("onnx", wrong, ("{runner}/run",)), 60)
    assert lied.runner_sha256 != swapped.runner_sha256

    def failed(ran: Ran, same: bool, tie: float | None = None) -> list[str]:
        assert host.expected is not None
        noise = host.expected.noise if tie is None else {"prefill": np.asarray([tie])}
        held_to = replace(host, expected=replace(host.expected, noise=noise))
        result, _ = check(held_to, ran, same)
        assert result.passed is not any(not gate.passed for gate in result.gates)
        assert result.lost_at == (None if result.passed else "device")
        return [gate.name for gate in result.gates if not gate.passed]

    for same in (True, False):
        assert {"greedy tokens", "logits", "farthest position"} <= set(failed(swapped, same))
        assert failed(lied, same) == ["greedy tokens"]
    assert failed(lied, False, tie=1.0) == []  # as far as a tie reaches, either token is right

    # An Arm processor rounds the inputs of 4-bit products otherwise, and may; not so what it holds.
    four = host_reference(
        Execution(other),
        asked.evaluation,
        expected=asked.expected(other),
        composition="both",
        metric="rougeL",
        by_token=partial(asked.answers, other.quantization, "onnx", rounding="token"),
    )
    with session(Device(phone.address)) as held:
        right, wrong_one = [run_job(held, job_of(four), each, sound, 60) for each in (other, ours)]
    arm = {"device": right.device.model_copy(update={"abi": "arm64-v8a"})}
    assert check(four, replace(right, **arm), False)[0].passed
    result, _ = check(four, replace(wrong_one, **arm), False)
    assert {"logits", "farthest position"} <= {g.name for g in result.gates if not g.passed}

    result, _ = check(host, lied, True)
    report = ParityReport(
        machine=Machine(cpu="A", cores=1, memory_gb=1, os="Linux"),
        versions={},
        artifacts=[],
        devices=[result],
    )
    write_result(report, tmp_path / PARITY)
    page = write_report(tmp_path).read_text()
    assert "1 of 1 run on a device failed" in page
    write_junit(report.devices, tmp_path / JUNIT)
    assert 'type="device"' in (tmp_path / JUNIT).read_text()
    assert "✕ lost at device" in summary(report)


def test_llama_main_is_held_by_its_texts_and_timed(
    phone: Daemon,
    artifacts: list[Path],
    base_dir: Path,
    adapter_dirs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ExecuTorch's flags and output by its Python binding, as if it had been built for a phone."""
    program = tmp_path / "llama_main"
    command = f'{sys.executable} -m caliport.android_harness.runners.llama_main "$@"'
    program.write_text(f"#!/bin/sh\nexec {command}\n")
    program.chmod(0o755)
    model = eager(base_dir, adapter_dirs[0], "fp32")
    words = sorted({word for text in TEXTS for word in text.split()})
    asked = make_evaluation(model, load_tokenizer(base_dir), words, max_new_tokens=2, positions=2)
    host = host_reference(
        Execution(Artifact.read(artifacts[2])), asked, composition="both", metric="rougeL"
    )
    bench = (
        *("bench", artifacts[2], "--device", phone.address, "--llama-main", program),
        *("--length", 8, "--new-tokens", 4, "--repetitions", 1, "--threads", 1, "--cool", 0),
        *("--out", tmp_path),
    )
    monkeypatch.setattr(texts, "PROMPTS", 2)
    where = Where((Device(phone.address),), llama_main=program)
    ((result, _),), troubles = where.check(host)
    assert troubles == []
    assert (result.runner, result.device.kind, result.measures) == ("llama_main", "phone", None)
    assert (result.passed, result.identical, result.examples) == (True, 2, 2)

    assert run(*bench) == 0
    (found,) = read_result(LatencyReport, tmp_path / LATENCY).artifacts
    assert [each.prompt_tokens for each in found.lengths] == [8]
    assert found.decode_rate.median > 0
    assert found.peak_bytes is None

    program.write_text(f"#!/bin/sh\n{command} | sed '/PyTorchObserver/!s/$/x/'\n")
    ((result, _),), _ = where.check(host)
    assert (result.passed, result.lost_at, result.identical) == (False, "device", 0)
    assert result.gates[0].name == "greedy texts"
    with pytest.raises(InputError, match="expected --llama-main FILE"):
        runner_for(facts(Device(phone.address)), "executorch")


def test_what_a_device_leaves_out_is_taken_as_one() -> None:
    draw = np.random.default_rng(0)
    host = draw.normal(0, 3, (5, 50)).astype(np.float32)
    there = (host + draw.normal(0, 0.3, host.shape)).astype(np.float32)
    kl = kl_divergence(host, there)
    last = np.zeros(5)
    for top in (8, 20, 49, 50):
        found = estimated(host, [row_of(row, top) for row in there])
        sums = [np.log(np.exp(rows.astype(float)).sum(axis=-1)) for rows in (found, there)]
        assert sums[0] == pytest.approx(sums[1], abs=0.01)
        told = kl_divergence(host, found)
        assert (told <= kl + 1e-9).all()
        assert told.sum() >= last.sum()
        last = told
    assert last == pytest.approx(kl)


def test_times_follow_the_protocol_and_a_stand_in_has_none(
    linux: list[Daemon],
    artifacts: list[Path],
    runner: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = {
        "bin/settings": '#!/bin/sh\n[ "$*" = "get global airplane_mode_on" ] && echo 1\n',
        "dumpsys-power": "POWER MANAGER\n  mWakefulness=Asleep\n",
    }
    for name, text in said.items():
        (linux[0].facts / name).write_text(text, encoding="utf-8")
        (linux[0].facts / name).chmod(0o755)
    thermal = linux[0].facts / "dumpsys-thermalservice"
    warm = thermal.read_text(encoding="utf-8")  # status 1

    looks = []

    def cools(device: Device) -> Facts:
        if len(looks) == 3:
            thermal.write_text(warm.replace("Status: 1", "Status: 0"), encoding="utf-8")
        looks.append(facts(device))
        return looks[-1]

    def bench(place: Path, *more: object) -> LatencyReport:
        code = run(
            *("bench", *artifacts[:2], "--device", linux[0].address, "--runner", runner),
            *("--length", 16, "--length", 4, "--length", 512, "--new-tokens", 3, "--threads", 1),
            *("--repetitions", 2, "--core", 0, "--out", place, *more),
        )
        assert code == 0
        return read_result(LatencyReport, place / LATENCY)

    monkeypatch.setattr(latency, "_POLL", 0.01)
    monkeypatch.setattr(latency, "facts", cools)
    report = bench(tmp_path / "first", "--cool", 30)
    assert [look.thermal for look in looks[:5]] == [1, 1, 1, 0, 0]
    how = report.device
    assert how is not None
    assert [state.cool for state in how.states] == [True] * 5
    assert how.states[0].waited_seconds > 0 == how.states[-1].waited_seconds
    assert {(s.battery, s.celsius, s.thermal) for s in how.states} == {(0.85, 27.3, 0)}
    assert (how.airplane, how.screen) == (True, "Asleep")
    assert [sorted(turns) for turns in how.order] == [[0, 1], [0, 1]]
    assert list(how.runners) == ["caliport-onnx 1"]
    assert report.cores == (0,)
    for result in report.artifacts:
        assert [each.prompt_tokens for each in result.lengths] == [4, 16]  # 512 does not fit 96
        assert result.prompt_tokens == 16
        assert len(result.load_seconds.values) == len(result.decode_rate.values) == 2
        assert result.lengths[1].p90_seconds >= result.first_token_seconds.median > 0
        assert result.idle_bytes is not None
        assert result.peak_bytes is not None
        assert 1e6 < result.idle_bytes < result.peak_bytes
        assert result.noise == LABEL
    out = capsys.readouterr().out
    assert LABEL in out
    assert "tokens/s" not in out
    page = (tmp_path / "first/report.html").read_text()
    assert LABEL in page
    assert "First token of" not in page

    thermal.write_text(warm, encoding="utf-8")
    properties(linux[0])  # a phone, but a warm one
    report = bench(tmp_path / "second", "--cool", 0)
    assert report.machine.os == "Android 15 x86_64"
    warning = "4 of 4 turns began above 35 °C or thermal status 0, after 0 s to cool"
    assert {result.noise for result in report.artifacts} == {warning}
    told = capsys.readouterr()
    assert "tokens/s" in told.out
    assert warning in " ".join((told.out + told.err).split())
    assert "First token of 16" in (tmp_path / "second/report.html").read_text()

    assert run("compare", tmp_path / "first", tmp_path / "second") == 0
    out = capsys.readouterr().out
    assert f"{LABEL}: they are left out" in " ".join(out.split())
    assert "onnx-int4: onnx int4" in (tmp_path / "second/compare.html").read_text()


def test_a_phone_has_a_baseline_of_its_own(tmp_path: Path) -> None:
    phone = DeviceUsed(
        serial="one",
        kind="phone",
        model="Example Phone",
        android="15",
        abi="arm64-v8a",
        cores=8,
        features=("dotprod",),
    )
    how = DeviceConditions(
        device=phone,
        runners={"caliport-onnx 1": "a" * 64},
        airplane=True,
        screen="Awake",
        celsius=35,
        thermal=0,
        cool_seconds=0,
        order=((0, 1),),
        states=(),
    )
    machine = Machine(cpu=phone.model, cores=8, memory_gb=8.0, os="Android 15 arm64-v8a")
    parity, there, _ = run_of()
    there = there.model_copy(
        update={"device": how, "machine": machine, "versions": {"onnxruntime": "1.31.1"}}
    )
    place = write_run(tmp_path / "run", parity, there)
    assert run("baseline", "store", place, tmp_path) == 0
    file, baseline = read_baseline(tmp_path, machine)
    assert file.name == "example-phone-8-cores-android-15-arm64-v8a.json"
    verdicts, notes = hold_times(there, baseline)
    assert notes == []
    name = "describe in German: onnx int4"
    assert [gate.passed for gate in verdicts[name]] == [True, True, True]
    slower = there.model_copy(update={"artifacts": [times("fp32", 100.0), times(rate=150.0)]})
    failed = [gate for gate in hold_times(slower, baseline)[0][name] if not gate.passed]
    assert {gate.stage for gate in failed} == {"speed"}
    other = there.model_copy(update={"machine": machine.model_copy(update={"cpu": "Other"})})
    assert hold_times(other, baseline) == (
        {},
        ["made with another processor: Example Phone, here Other"],
    )
    held = hold_to(parity, [], None, file, baseline, RegressionLimits())
    assert held.baseline is not None
    assert "timed on a device" in held.baseline.notes[0]
    assert all(artifact.passed for artifact in held.artifacts)
