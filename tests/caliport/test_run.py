"""The whole path on a tiny model, as a user runs it: the commands, their files and exit codes."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from commands import caliport
from peft import PeftModel
from transformers import AutoModelForCausalLM

from caliport.android_harness.toolchain.build import build_runner
from caliport.core.directories import content_hash, read_manifest
from caliport.export.calibrated.integers import Integers
from caliport.recipe.read import read_recipe
from caliport.run.resolve import chosen_on, read_score, reported
from caliport.run.workspace import Workspace
from caliport.validation.records.reports import ParityReport, QualityReport, read_result
from tests import commands
from tests.android.daemon import PROJECT
from tests.forking import forked

RECIPE = """
name: tiny
data: {source: pocket, train: 96, validation: 12}
base:
  shape: {vocab_size: 400, hidden_size: 64, intermediate_size: 160, layers: 2, context: 320}
  train: {steps: 12, batch_size: 8, learning_rate: 5.0e-3, prompt_loss: true}
adapters: {summarize: , translate_es: }
lora: {rank: 4, alpha: 8, train: {steps: 3, batch_size: 8, learning_rate: 5.0e-3}}
compositions: {summarize_es: [summarize, translate_es]}
calibration:
  examples: 64
  lc: {steps: 3, batch_size: 8, learning_rate: 5.0e-3}
  lc++: {steps: 3, batch_size: 8, learning_rate: 5.0e-3}
  joint: {steps: 3, batch_size: 8, learning_rate: 5.0e-3}
evaluation: {examples: 8, max_new_tokens: 8}
export: {context: 256}
validation: {examples: 4, repetitions: 1}
"""
FORMS = [f"{r}-{p}" for r in ("executorch", "onnx") for p in ("fp32", "int8", "int4")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the tiny recipe has been run to its end."""
    place = tmp_path_factory.mktemp("place")
    (place / "tiny.yaml").write_text(RECIPE)
    done = caliport("run", "tiny.yaml", cwd=place)
    (place / "output.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def test_run_directory_is_the_contract(place: Path) -> None:
    run = place / "runs" / "tiny"
    expected = ["base", "adapters/summarize", "adapters/translate_es"]
    expected += [f"composed/summarize_es/{m}" for m in ("linear", "exact", "lc", "lc++", "joint")]
    expected += [f"artifacts/summarize_es/{form}" for form in FORMS]
    for name in expected:
        manifest = read_manifest(run / name)
        files = {p.name for p in (run / name).iterdir() if p.is_file()} - {"manifest.json"}
        assert set(manifest["files"]) == files
        assert manifest["key"]
        assert manifest["versions"]["torch"]
    for form in FORMS:
        files = {p.name for p in (run / "artifacts/summarize_es" / form).iterdir()}
        graph = {"model.pte"} if form.startswith("executorch") else {"model.onnx"}
        assert graph | {"tokenizer.json", "manifest.json"} <= files
        if form.startswith("onnx"):
            assert {"model.onnx.data", "genai_config.json"} <= files
    reports = {p.name for p in (run / "reports").iterdir()}
    assert reports == {
        "audit.json",
        "quality.json",
        "parity.json",
        "latency.json",
        "junit.xml",
        "report.html",
        "summary.md",
    }
    assert not list(run.rglob(".*partial*"))
    assert not list(run.rglob(".*resume*"))


def test_last_screen_shows_tables_and_report(place: Path) -> None:
    output = (place / "output.txt").read_text()
    for shown in (
        "LC++ (Eq. 7)",
        "joint-expert LoRA",
        "multi-step",
        "onnx int4",
        "executorch int8",
        "summarize_es: the first of the 8 examples",
    ):
        assert shown in output
    report = read_result(QualityReport, place / "runs/tiny/reports/quality.json")
    screen = f" {' '.join(output.partition('the first of the 8 examples')[2].split())}"
    heads = [
        "asked",
        "expected",
        "base alone",
        "linear merge (Eq. 5)",
        "executorch int4",
        "onnx int4",
    ]
    assert [head for head in heads if f" {head} " in screen] == heads
    assert report.compositions["summarize_es"].samples[0].reference in screen
    assert "report: runs/tiny/reports/report.html" in output
    assert "Traceback" not in output


def test_what_ships_is_chosen_on_examples_that_are_not_reported(place: Path) -> None:
    space = Workspace(read_recipe(place / "tiny.yaml"), place / "runs/tiny")
    scored, others = reported(space, "summarize_es", 8), chosen_on(space, "summarize_es")
    assert (len(scored), len(others)) == (8, 3)
    assert not {e.input for e in scored} & {e.input for e in others}
    report = read_result(QualityReport, place / "runs/tiny/reports/quality.json")
    found = report.compositions["summarize_es"]
    assert (found.examples, found.chosen_on) == (8, 3)
    small = ("linear", "exact", "lc", "lc++")
    losses = {name: read_score(space, "summarize_es", name)["choice_loss"] for name in small}
    assert found.best == min(losses, key=lambda name: losses[name])


def test_the_budget_says_where_accuracy_was_lost(place: Path) -> None:
    """From the adapters to every artifact, with the figures that the gates were decided by."""
    report = read_result(ParityReport, place / "runs/tiny/reports/parity.json")
    (budget,) = report.budgets
    shared = [stage for stage in budget.stages if not stage.form]
    names = [stage.stage for stage in shared]
    assert names in (
        ["exact sum", "merge", "calibration"],
        ["exact sum", "calibration"],
    ), "the merge is left out where it ships itself"
    best = report.artifacts[0].method
    assert ("merge" in names) == (best in ("lc", "lc++"))
    assert shared[0].previous is None
    assert all(stage.task is not None for stage in budget.stages)
    for result in report.artifacts:
        form = f"{result.runtime}-{result.precision}"
        eager, artifact = (stage for stage in budget.stages if stage.form == form)
        assert (eager.stage, artifact.stage) == ("quantized eager", "artifact")
        assert eager.previous == result.quantization
        assert artifact.previous == result.lowering
        assert result.task is not None
        assert artifact.task == result.task.artifact
        assert shared[-1].task == result.task.fp32
        assert artifact.previous is not None
        assert max(artifact.by_position) >= artifact.previous.kl
        assert artifact.by_layer == eager.by_layer == ()
    forms = [stage.form for stage in budget.stages if stage.form]
    assert forms == [form for form in FORMS for _ in range(2)]
    assert "summarize_es: error budget" in (place / "output.txt").read_text()


def test_composed_adapters_load_in_peft(place: Path) -> None:
    """PEFT's logits of the saved LC++ are those of the fp32 artifact's eager twin."""
    from caliport.export.reference.folded import eager

    run = place / "runs" / "tiny"
    adapter = run / "composed/summarize_es/lc++"
    base = AutoModelForCausalLM.from_pretrained(run / "base", dtype=torch.float32)
    tokens = torch.tensor([[1, 3, 50, 60, 70, 4]])
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, adapter).eval()(tokens).logits
        ours = eager(run / "base", adapter, "fp32")(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_second_run_skips_all_and_a_change_only_what_depends_on_it(place: Path) -> None:
    run = place / "runs" / "tiny"
    before = {p: p.stat().st_mtime_ns for p in run.rglob("manifest.json")}
    again = forked("run", "tiny.yaml", cwd=place)
    assert again.returncode == 0
    assert ": done" not in again.stderr
    assert again.stderr.count("up to date, skipped") == len(before)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("manifest.json")} == before
    changed = forked("calibrate", "tiny.yaml", "--set", "calibration.lc.steps=4", cwd=place)
    assert changed.returncode == 0, changed.stderr
    done = [line for line in changed.stderr.splitlines() if line.endswith(": done")]
    assert done == ["summarize_es: lc: done", "summarize_es: score of lc: done"]
    assert forked("calibrate", "tiny.yaml", cwd=place).returncode == 0


def test_stages_from_flags(place: Path) -> None:
    """The same code from flags alone gives what the recipe gives.

    In int8, since int4 moves this base by more than adapters of three steps do.
    """
    run = place / "runs" / "tiny"
    base, adapters = "runs/tiny/base", run / "adapters"
    flags = ["--base", base, "--adapter", adapters / "summarize"]
    flags += ["--adapter", adapters / "translate_es", "--method", "exact", "--out", "mine"]
    done = forked("calibrate", *flags, cwd=place)
    assert done.returncode == 0, done.stderr
    assert content_hash(place / "mine") == content_hash(run / "composed/summarize_es/exact")
    flags = ["--base", base, "--adapter", place / "mine", "--runtime", "onnx"]
    done = forked("export", *flags, "--precision", "int8", "--out", "art", cwd=place)
    assert done.returncode == 0, done.stderr
    flags = ["--base", base, "--adapter", place / "mine"]
    done = forked("validate", "art", *flags, "--by-layer", "--out", "checked", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    (budget,) = read_result(ParityReport, place / "checked/parity.json").budgets
    assert [stage.stage for stage in budget.stages] == [
        "calibration",
        "quantized eager",
        "artifact",
    ]
    assert [len(stage.by_layer) for stage in budget.stages] == [0, 3, 0]
    assert {"parity.json", "latency.json", "junit.xml", "report.html", "summary.md"} == {
        p.name for p in (place / "checked").iterdir()
    }
    flags = ["--base", base, "--adapter", adapters / "summarize", "--no-latency"]
    done = forked("validate", "art", *flags, cwd=place)
    assert done.returncode == 1, "an artifact of another adapter passed"
    assert "FAIL" in done.stdout


def test_base_alone_from_flags(place: Path) -> None:
    flags = ["--base", place / "runs/tiny/base"]
    done = forked("export", *flags, "--runtime", "onnx", "--out", "plain", cwd=place)
    assert done.returncode == 0, done.stderr
    assert forked("validate", "plain", *flags, "--no-latency", cwd=place).returncode == 0


def test_failed_gate_is_exit_1_and_a_junit_failure(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "copy")
    change = ["--set", "validation.limits.int8.kl=0", "--set", "validation.limits.int8.kl_times=0"]
    change += ["--set", "export.runtimes=[onnx]", "--no-latency"]  # gates are alike in both
    done = forked("validate", "tiny.yaml", *change, cwd=tmp_path / "copy")
    assert done.returncode == 1, done.stdout + done.stderr
    reports = tmp_path / "copy/runs/tiny/reports"
    assert "<failure" in (reports / "junit.xml").read_text()
    failed = [
        a for a in json.loads((reports / "parity.json").read_text())["artifacts"] if not a["passed"]
    ]
    assert {a["precision"] for a in failed} == {"int8"}
    assert {a["lost_at"] for a in failed} == {"lowering"}


def test_a_recipe_ships_bundles(place: Path, tmp_path: Path) -> None:
    """One for all compositions, on shared adapters; what is not asked for any more is not there.

    Its base has the very integers that the correction was trained through and scored with.
    """
    shutil.copytree(place, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/runs/tiny/artifacts")
    change = ["--set", "export.ship=[bundle]", "--set", "export.precisions=[int4]"]
    through = "lc++-int4-bundle"
    change += ["--set", f"calibration.methods=[{through}]", "--set", f"export.method={through}"]
    change += ["--set", f"evaluation.quantized={{int4-bundle: [{through}]}}"]
    done = forked("run", "tiny.yaml", *change, cwd=tmp_path / "copy")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "copy/runs/tiny"
    assert f"{through} in int4-bundle" in done.stdout + done.stderr
    trained_through = Integers(run / "shared/int4-bundle")
    for runtime in ("executorch", "onnx"):
        shipped = read_manifest(run / f"bundles/{runtime}-int4")["calibration"]["weights"]
        assert len(shipped) == 15
        for module, hashes in shipped.items():
            for part, found in zip(trained_through.parts(module), hashes, strict=True):
                content = part.contiguous().view(torch.uint8).numpy().tobytes()
                assert hashlib.sha256(content).hexdigest().startswith(found)
    assert not (run / "artifacts").exists()
    bundle = read_manifest(run / "bundles/executorch-int4")["bundle"]
    assert set(bundle["adapters"]) == {"summarize", "translate_es"}
    composition = bundle["compositions"]["summarize_es"]
    assert composition["stands_on"] == ["summarize", "translate_es"]
    assert 0 < composition["bytes"] < bundle["adapters"]["summarize"]["bytes"]
    for name in ("parity", "latency"):
        rows = json.loads((run / f"reports/{name}.json").read_text())["artifacts"]
        found = {(row["composition"], row["runtime"], row["bundle"]) for row in rows}
        runtimes = ("executorch", "onnx")
        parts = ("summarize_es", "base alone")
        assert found == {(part, runtime, True) for part in parts for runtime in runtimes}
    assert "onnx int4 bundle" in done.stdout


@pytest.mark.usefixtures("phone")
def test_a_recipe_goes_on_to_a_device(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "copy")
    (tmp_path / "copy/build").mkdir()
    (tmp_path / "copy/build/host").symlink_to(
        build_runner("host", PROJECT / "build/host", PROJECT / "build/runner")
    )
    change = ["--set", "export.runtimes=[onnx]", "--set", "export.precisions=[int4]"]
    command = ["validate", "tiny.yaml", *change, "--no-latency", "--device", "any"]
    done = commands.caliport(*command, cwd=tmp_path / "copy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count("up to date, skipped") == 2
    report = read_result(ParityReport, tmp_path / "copy/runs/tiny/reports/parity.json")
    (found,) = report.devices
    assert (found.composition, found.form, found.passed) == ("summarize_es", "int4", True)
    assert report.budgets[0].stages[-1].stage == "device"
    assert "parity with the host" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes(place: Path, tmp_path: Path) -> None:
    """Killed without warning again and again, it leaves no half directory and ends the same."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    draw = random.Random(0)
    for _ in range(8):
        forked("calibrate", "tiny.yaml", cwd=tmp_path, kill_after=draw.uniform(0.2, 3.0))
        for directory in (tmp_path / "runs/tiny").glob("**/adapter_config.json"):
            if not any(part.startswith(".") for part in directory.relative_to(tmp_path).parts):
                assert (directory.parent / "manifest.json").exists(), directory
    assert forked("calibrate", "tiny.yaml", cwd=tmp_path).returncode == 0
    for name in ("base", "adapters/summarize", "composed/summarize_es/lc++"):
        whole, resumed = place / "runs/tiny" / name, tmp_path / "runs/tiny" / name
        assert content_hash(whole) == content_hash(resumed)
    assert not list((tmp_path / "runs/tiny").rglob(".*partial*"))
