"""``make test-arm64``: an ARM64 machine over adb says what this one says. QEMU emulates it.

Not named ``test_``, so that ``make test`` leaves it out: it needs packages that root installs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import ENVIRONMENT, ROOT, caliport
from conftest import TEXTS
from transformers import AutoModelForCausalLM, AutoTokenizer

from caliport.android_harness.device.adb import Device, adb, connect
from caliport.android_harness.device.session import session
from caliport.android_harness.run import run_job
from caliport.android_harness.runners.job import Answer, Job, Prompt
from caliport.android_harness.runners.kinds import JobRunner, answers, read_runner
from caliport.android_harness.toolchain.build import build_runner
from caliport.core.directories import read_manifest
from caliport.core.errors import InputError
from caliport.export.artifact import Artifact
from caliport.validation.records.reports import PARITY, ParityReport, read_result
from caliport.validation.runners.onnx import OnnxRunner
from tests.android.arm64.machine import arm64_machine, free_port
from tests.exports import to_onnx

BUILD = ROOT / "build"
CACHE = BUILD / "runner"
CONTEXT = 96
PROMPT = 4  # tokens of each text that are given
SECONDS = 100.0
SHORT = {
    "data.train": 1000,
    "base.train.steps": 60,
    "lora.train.steps": 5,
    "calibration.methods": "[lc++]",
    "calibration.examples": 500,
    "calibration.lc++.steps": 20,
    "evaluation.examples": 8,
    "evaluation.max_new_tokens": 16,
    "export.runtimes": "[onnx]",
    "export.precisions": "[int8,int4]",
    "validation.examples": 6,
}
"""The toy, trained for seconds."""

# Largest difference of a logit; measured 3e-6, 0.017 and 0.053. Both machines round the inputs of
# quantized products to 8 bits, but not alike: docs/android.md.
NEAR = {"fp32": 1e-4, "int8": 0.06, "int4": 0.15}


@pytest.fixture(scope="module")
def texts(base_dir: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def reciting(
    base_dir: Path, texts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny base, taught to recite: random weights leave greedy tokens to rounding."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = sum(model(torch.tensor([t]), labels=torch.tensor([t])).loss for t in texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    directory = tmp_path_factory.mktemp("reciting")
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(base_dir).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def runner() -> JobRunner:
    return read_runner(build_runner("aarch64", BUILD / "aarch64", CACHE))


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    with pytest.MonkeyPatch.context() as patch:
        port = str(free_port())
        patch.setenv("ANDROID_ADB_SERVER_PORT", port)
        patch.setitem(ENVIRONMENT, "ANDROID_ADB_SERVER_PORT", port)
        try:
            with arm64_machine(CACHE) as address:
                connect(address)
                yield Device(address)
        finally:
            adb(["kill-server"])


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def artifact(
    request: pytest.FixtureRequest, reciting: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / request.param
    return to_onnx(reciting, out, precision=request.param, context=CONTEXT)


def farthest(found: tuple[Answer, ...], expected: tuple[Answer, ...]) -> float:
    """The largest difference of a logit that is among the ten largest on both sides."""
    differences = []
    for mine, theirs in zip(found, expected, strict=True):
        for row, reference in zip(mine.rows, theirs.rows, strict=True):
            other = dict(zip(reference.ids, reference.logits, strict=True))
            pairs = zip(row.ids, row.logits, strict=True)
            near = [abs(logit - other[i]) for i, logit in pairs if i in other]
            assert len(near) >= 5
            differences += near
    return max(differences)


def test_arm64_says_what_this_machine_says(
    device: Device, runner: JobRunner, artifact: Path, texts: list[list[int]]
) -> None:
    length = min(map(len, texts))
    asked = [Prompt(tokens=tuple(t[:PROMPT]), targets=tuple(t[PROMPT:length])) for t in texts]
    job = Job(
        runtime="onnx",
        directory=artifact.name,
        threads=1,
        max_new_tokens=length - PROMPT,
        prompts=tuple(asked),
    )
    bad = job.model_copy(update={"prompts": (Prompt(tokens=(384,)),)})
    expected = answers(OnnxRunner(artifact, threads=1), job)
    with session(device) as held:
        found = run_job(held, job, Artifact.read(artifact), runner, SECONDS).result
        with pytest.raises(InputError, match=r"exit code 2: .* token 384, expected 0 to 383"):
            run_job(held, bad, Artifact.read(artifact), runner, SECONDS)
    for answer, prompt in zip(found.answers, asked, strict=True):
        assert answer.tokens == prompt.targets
    assert [a.tokens for a in found.answers] == [a.tokens for a in expected]
    floats = answers(OnnxRunner(artifact, threads=1, float_activations=True), job)
    distance = farthest(found.answers, expected)
    print(
        f"{artifact.name}: from this machine's logits {distance:.2g}; from unrounded ones "
        f"{farthest(found.answers, floats):.2g} there, {farthest(expected, floats):.2g} here"
    )
    assert distance < NEAR[artifact.name]
    assert found.cores == (0, 1)
    assert runner.directory is not None
    assert found.runtime_version == read_manifest(runner.directory)["runtime_version"]
    assert 2e6 < found.idle_bytes < found.loaded_bytes <= found.peak_bytes


@pytest.mark.usefixtures("runner")
def test_the_toy_passes_its_gates_on_arm64(device: Device, tmp_path: Path) -> None:
    """By a user's commands: the recipe's shape and text, held in units of rounding."""
    (tmp_path / "build").symlink_to(BUILD)
    change = [word for name, value in SHORT.items() for word in ("--set", f"{name}={value}")]
    recipe = ROOT / "recipes/toy.yaml"
    for command in (["calibrate"], ["export"], ["validate", "--no-latency", "--device", "any"]):
        done = caliport(command[0], recipe, *command[1:], *change, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    report = read_result(ParityReport, tmp_path / "runs/toy/reports" / PARITY)
    assert [result.form for result in report.devices] == ["int8", "int4"]
    for result in report.devices:
        assert result.passed
        assert result.identical + result.ties == result.examples == 6
        assert not result.exact
        assert (result.device.serial, result.device.abi) == (device.serial, "arm64-v8a")
        assert "emulated CPU" in result.device.label
    assert report.budgets[0].stages[-1].stage == "device"
