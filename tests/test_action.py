"""The composite action: its shell steps run by bash as GitHub runs them, on real tiny artifacts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.forking import program

ROOT = Path(__file__).parents[1]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS = ACTION["runs"]["steps"]
SHELL_STEPS = [step for step in STEPS if "run" in step]
CALIPORT = str(Path(sys.executable).parent / "caliport")
INPUT = re.compile(r"\$\{\{ inputs\.([a-z-]+) \}\}")
EXAMPLE = yaml.safe_load((ROOT / "docs/examples/parity.yml").read_text(encoding="utf-8"))


@dataclass
class Done:
    """What a step did: its exit code, all it printed, its outputs and the job's summary."""

    code: int
    text: str
    outputs: dict[str, str]
    summary: str


def step(name: str) -> dict[str, Any]:
    (found,) = [step for step in SHELL_STEPS if step["name"].startswith(name)]
    return found


def run_step(name: str, place: Path, program: str = CALIPORT, **given: object) -> Done:
    """Run one step with ``given`` inputs (dashes as underscores) and the others' defaults.

    ``program`` is the ``caliport`` that it finds.
    """
    inputs = {key: str(value["default"]) for key, value in ACTION["inputs"].items()}
    given = {key.replace("_", "-"): str(value) for key, value in given.items()}
    assert given.keys() <= inputs.keys()
    inputs |= given
    found = step(name)
    script = place / ".step.sh"
    script.write_text(found["run"])
    files = {
        variable: place / f".{variable}" for variable in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")
    }
    for file in files.values():
        file.write_text("")
    environment = {
        "PATH": f"{Path(program).parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": os.environ.get("HOME", str(place)),
        "OMP_NUM_THREADS": "1",
        "CI": "true",
        "GITHUB_ACTIONS": "true",
        "GITHUB_WORKSPACE": str(place),
        "GITHUB_ACTION_PATH": str(ROOT),
        **{variable: str(file) for variable, file in files.items()},
        **{key: INPUT.sub(lambda m: inputs[m[1]], value) for key, value in found["env"].items()},
    }
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
    done = subprocess.run(command, cwd=place, env=environment, text=True, capture_output=True)
    lines = files["GITHUB_OUTPUT"].read_text().splitlines()
    return Done(
        done.returncode,
        done.stdout + done.stderr,
        dict(line.split("=", 1) for line in lines),
        files["GITHUB_STEP_SUMMARY"].read_text(),
    )


@pytest.fixture(scope="module")
def caliport(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A ``caliport`` that starts fast, for all but the test of an artifact that passes."""
    with program(tmp_path_factory.mktemp("bin")) as path:
        yield str(path)


@pytest.fixture(scope="module")
def artifact(
    base_dir: Path, adapter_dirs: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The first adapter folded in, for ONNX in int4, in a directory with a space in its name."""
    from tests.exports import to_onnx

    out = tmp_path_factory.mktemp("made") / "my artifact"
    return to_onnx(base_dir, out, adapter=adapter_dirs[0], precision="int4")


def test_no_input_is_pasted_into_a_script() -> None:
    for found in SHELL_STEPS:
        assert "${{" not in found["run"], found["name"]
        assert found["shell"] == "bash"
        assert all(INPUT.fullmatch(value) for value in found["env"].values())
    for job in EXAMPLE["jobs"].values():
        assert not any("${{" in found.get("run", "") for found in job["steps"])


def test_every_input_is_used_and_every_output_is_made() -> None:
    text = yaml.safe_dump(ACTION["runs"])
    for name in ACTION["inputs"]:
        assert f"inputs.{name} " in text, name
    used = yaml.safe_dump(ACTION["outputs"])
    assert set(re.findall(r"steps\.validate\.outputs\.(\w+)", used + text)) == {
        "verdict",
        "reports",
    }


def test_other_actions_are_pinned_by_commit() -> None:
    jobs = [found for job in EXAMPLE["jobs"].values() for found in job["steps"]]
    used = [found["uses"] for found in (*STEPS, *jobs) if "uses" in found]
    foreign = [name for name in used if not name.startswith("OWNER/caliport@")]
    assert len(used) - len(foreign) == 1
    assert foreign
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", name) for name in foreign)


def test_the_example_gives_what_the_action_takes() -> None:
    parity, comment = EXAMPLE["jobs"]["parity"], EXAMPLE["jobs"]["comment"]
    (found,) = [s for s in parity["steps"] if s.get("uses", "").startswith("OWNER/caliport@")]
    assert found["with"].keys() <= ACTION["inputs"].keys()
    assert (ROOT / found["with"]["recipe"]).is_file()
    (upload,) = [s for s in STEPS if s.get("name") == "Upload the reports"]
    name = INPUT.sub(lambda m: ACTION["inputs"][m[1]]["default"], upload["with"]["name"])
    assert comment["steps"][0]["with"]["name"] == name
    assert EXAMPLE["permissions"] == {"contents": "read"}
    assert comment["permissions"] == {"pull-requests": "write"}


@pytest.mark.parametrize(
    "script",
    [
        found["run"]
        for found in (*STEPS, *(s for job in EXAMPLE["jobs"].values() for s in job["steps"]))
        if "run" in found
    ],
    ids=["check", "install", "validate", "comment"],
)
def test_scripts_are_sound(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("extras", ["", "dev"])
def test_it_installs_itself_at_its_own_version(tmp_path: Path, extras: str) -> None:
    """What pip would be asked for, with ``printf`` in its place: the network is nobody's here."""
    script = step("Install")["run"].replace("python -m pip install --quiet", "printf '%s\\n'")
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script],
        env={"TORCH": "torch==2.13.0", "EXTRAS": extras, "GITHUB_ACTION_PATH": "/a b"},
        text=True,
        capture_output=True,
    )
    assert done.stdout.splitlines() == ["torch==2.13.0", "/a b[dev]" if extras else "/a b"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "neither recipe nor artifact is given"),
        ({"artifact": "art"}, "base is missing"),
        ({"artifact": "gone", "base": "b"}, "artifact: no such directory: gone"),
        ({"recipe": "gone.yaml"}, "recipe: no such file: gone.yaml"),
        ({"recipe": "r.yaml", "base": "b"}, "recipe is given together with artifact, base"),
        ({"recipe": "r.yaml", "command": "rm"}, "command: found rm, expected run or validate"),
        ({"recipe": "$(touch pwned)"}, "no such file: $(touch pwned)"),
    ],
)
def test_bad_inputs_are_one_line_and_exit_2(
    tmp_path: Path, given: dict[str, str], says: str
) -> None:
    (tmp_path / "r.yaml").write_text("")
    (tmp_path / "art").mkdir()
    done = run_step("Check", tmp_path, **given)
    assert done.code == 2
    (line,) = done.text.splitlines()
    assert line.startswith("::error::caliport: ")
    assert says in line
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"adapter": "gone"}, "gone"),
        ({"prompts": "gone.jsonl"}, "gone.jsonl"),
        ({"threads": "many"}, "--threads"),
        ({"baseline": "gone.json"}, "gone.json: no such baseline"),
        ({"base": "./gone"}, "gone"),
    ],
)
def test_what_caliport_refuses_is_one_line_and_exit_2(
    caliport: str,
    tmp_path: Path,
    artifact: Path,
    base_dir: Path,
    given: dict[str, str],
    says: str,
) -> None:
    inputs = {"program": caliport, "artifact": artifact, "base": base_dir, **given}
    assert run_step("Check", tmp_path, **inputs).code == 0
    done = run_step("Validate", tmp_path, **inputs)
    assert done.code == 2, done.text
    (line,) = done.text.splitlines()
    assert line.startswith("caliport: ")
    assert says in line
    assert done.outputs == {}


@pytest.fixture(scope="module")
def passed(
    artifact: Path,
    base_dir: Path,
    adapter_dirs: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Done]:
    """Where a sound artifact was validated, and what that step did."""
    place = tmp_path_factory.mktemp("passed")
    inputs = {"artifact": artifact, "base": base_dir, "adapter": adapter_dirs[0], "threads": 1}
    assert run_step("Check", place, **inputs).code == 0
    return place, run_step("Validate", place, **inputs)


def test_an_artifact_that_passes(passed: tuple[Path, Done]) -> None:
    place, done = passed
    assert done.code == 0, done.text
    assert done.outputs == {"verdict": "pass", "reports": "caliport-reports"}
    assert done.summary.startswith("## ✓ Accuracy survived\n")
    reports = place / "caliport-reports"
    assert {entry.name for entry in reports.iterdir()} == {
        "parity.json",
        "latency.json",
        "junit.xml",
        "report.html",
        "summary.md",
    }
    assert (reports / "summary.md").read_text() == done.summary
    assert "::error" not in done.text


def test_an_artifact_that_fails(
    caliport: str, tmp_path: Path, artifact: Path, base_dir: Path, adapter_dirs: list[Path]
) -> None:
    """Held to another adapter than the one that is in it."""
    inputs = {"artifact": artifact, "base": base_dir, "adapter": adapter_dirs[1], "reports": "out"}
    done = run_step("Validate", tmp_path, caliport, **inputs)
    assert done.code == 1, done.text
    assert done.outputs == {"verdict": "fail", "reports": "out"}
    assert done.summary.startswith("## ✕ 1 of 1 artifact failed\n")
    assert "<failure" in (tmp_path / "out" / "junit.xml").read_text()
    (line,) = [line for line in done.text.splitlines() if line.startswith("::")]
    assert line.startswith("::error file=")
    assert "my artifact/manifest.json,title=my artifact%3A onnx int4%3A lost at " in line


def test_a_baseline_decides(
    caliport: str,
    passed: tuple[Path, Done],
    artifact: Path,
    base_dir: Path,
    adapter_dirs: list[Path],
    tmp_path: Path,
) -> None:
    """Held to a run of its own it passes; held to one half as large it does not."""
    store = [caliport, "baseline", "store", str(passed[0] / "caliport-reports"), "kept.json"]
    subprocess.run(store, cwd=tmp_path, check=True, capture_output=True)
    inputs = {"artifact": artifact, "base": base_dir, "adapter": adapter_dirs[0], "threads": 1}
    done = run_step("Validate", tmp_path, caliport, **inputs, baseline="kept.json")
    assert done.code == 0, done.text
    assert "Held to kept.json, made on" in done.summary
    kept = tmp_path / "kept.json"
    size = sum(entry.stat().st_size for entry in artifact.rglob("*") if entry.is_file())
    assert kept.read_text().count(f'"bytes": {size},') == 1
    kept.write_text(kept.read_text().replace(f'"bytes": {size},', f'"bytes": {size // 2},'))
    done = run_step("Validate", tmp_path, caliport, **inputs, baseline="kept.json")
    assert done.code == 1, done.text
    assert done.outputs["verdict"] == "fail"
    assert "lost at **size**" in done.summary


RECIPE = """
name: tiny
data: {source: pocket, train: 64, validation: 8}
base:
  shape: {vocab_size: 400, hidden_size: 64, intermediate_size: 160, layers: 2, context: 320}
  train: {steps: 4, batch_size: 8, learning_rate: 5.0e-3, prompt_loss: true}
adapters: {summarize: , translate_es: }
lora: {rank: 4, alpha: 8, train: {steps: 6, batch_size: 8, learning_rate: 5.0e-3}}
compositions: {summarize_es: [summarize, translate_es]}
calibration: {examples: 16, methods: [linear]}
evaluation: {examples: 4, max_new_tokens: 4}
export: {context: 256, runtimes: [onnx], precisions: [int8]}
validation: {examples: 4, repetitions: 3}
"""


@pytest.mark.slow
def test_a_recipe_from_nothing_to_a_baseline_and_a_comparison(
    caliport: str, tmp_path: Path
) -> None:
    """The job's steps, then the commands of docs/ci.md, then the job again with the baseline."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    inputs = {"program": caliport, "recipe": "tiny.yaml", "threads": 1}
    assert run_step("Check", tmp_path, **inputs).code == 0
    done = run_step("Validate", tmp_path, **inputs)
    assert done.code == 0, done.text
    assert done.outputs["reports"] == "runs/tiny/reports"
    assert done.outputs["verdict"] in ("pass", "unsure")
    assert (tmp_path / "runs/tiny/reports/summary.md").read_text() == done.summary

    def command(*arguments: str) -> str:
        ran = subprocess.run(
            [caliport, *arguments], cwd=tmp_path, text=True, capture_output=True, check=True
        )
        return ran.stdout

    assert command("baseline", "store", "runs/tiny", "baselines").startswith("baseline: baselines/")
    shown = command("baseline", "show", "baselines")
    assert "made with" not in shown, "this machine is another one than this machine"
    assert re.search(r"^ *onnx int8 +\d+\.\d\d ", shown, re.MULTILINE)
    done = run_step("Validate", tmp_path, **inputs, command="validate", baseline="baselines")
    assert done.code == 0, done.text
    assert "up to date, skipped" in done.text, "a baseline made the checks run again"
    assert "Held to baselines/" in done.summary
    junit = (tmp_path / "runs/tiny/reports/junit.xml").read_text()
    assert 'name="baseline: size"' in junit
    said = command("compare", "runs/tiny", "runs/tiny")
    assert "page: runs/tiny/reports/compare.html" in said
    assert (tmp_path / "runs/tiny/reports/compare.html").is_file()
    worse = ["--set", "validation.regression.size=0", "--set", "validation.baseline=baselines"]
    ran = subprocess.run([caliport, "validate", "tiny.yaml", *worse], cwd=tmp_path)
    assert ran.returncode == 0, "the same bytes are no growth"
