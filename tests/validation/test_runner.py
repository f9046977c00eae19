from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from caliport.core.checkpoints import load_base
from caliport.core.errors import InputError
from caliport.export.artifact import Artifact
from caliport.export.request import Bundle
from caliport.validation.api import Options, validate
from caliport.validation.evaluation.measures import one_by_one, trace
from caliport.validation.gates.criteria import Caption, Criteria
from caliport.validation.gates.limits import limits_for
from caliport.validation.other_tools import validate_against
from caliport.validation.runners.eager import EagerRunner
from caliport.validation.runners.genai import GenaiRunner
from caliport.validation.runners.onnx import OnnxRunner
from caliport.validation.runners.open import Execution, open_runner
from caliport.validation.runners.runner import greedy
from tests.commands import ENVIRONMENT
from tests.exports import to_onnx, to_onnx_bundle
from tests.validation.conftest import Scene


@pytest.fixture(scope="module")
def runner(base_dir: Path) -> EagerRunner:
    return EagerRunner(load_base(base_dir), "eager")


def test_prefill_and_steps_are_the_models_own_logits(
    runner: EagerRunner, prompts: list[list[int]]
) -> None:
    for prompt in prompts:
        targets = [7, 9, 11]
        with torch.no_grad():
            whole = runner.model(torch.tensor([prompt + targets])).logits[0].numpy()
        found = trace(runner, prompt, targets)
        expected = whole[len(prompt) - 1 : -1]
        assert found.shape == (3, 384)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-4)
        np.testing.assert_allclose(runner.logits(prompt + targets), whole, atol=2e-4)
        np.testing.assert_allclose(one_by_one(runner, prompt), expected[0], atol=2e-4)


def test_prefill_forgets_what_came_before(runner: EagerRunner, prompts: list[list[int]]) -> None:
    fresh = runner.prefill(prompts[0])
    runner.step(3)
    np.testing.assert_array_equal(runner.prefill(prompts[0]), fresh)


def test_greedy_is_what_transformers_generates(
    runner: EagerRunner, prompts: list[list[int]]
) -> None:
    expected = runner.model.generate(
        torch.tensor([prompts[1]]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )[0, len(prompts[1]) :].tolist()
    assert greedy(runner, prompts[1], 12, eos_ids=()) == expected
    stop = expected[4]
    assert greedy(runner, prompts[1], 12, {stop}) == expected[: expected.index(stop) + 1]


def test_greedy_stops_where_the_context_is_full(runner: EagerRunner) -> None:
    assert runner.context == 128
    assert len(greedy(runner, [5] * 126, 10, ())) == 2


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "no manifest.json"),
        ({"runtime": "tflite", "precision": "int8"}, "runtime is 'tflite', expected executorch"),
        ({"runtime": "onnx"}, "precision is None"),
    ],
)
def test_open_runner_names_what_is_wrong(
    tmp_path: Path, manifest: dict[str, str] | None, message: str
) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message):
        open_runner(Artifact.read(tmp_path), threads=1)


def test_genai_gives_the_logits_of_its_graph(onnx_dir: Path, prompts: list[list[int]]) -> None:
    """Prefill, steps, tokens that end a text, and a whole context; nothing stays after it."""
    plain, genai = OnnxRunner(onnx_dir, threads=1), GenaiRunner(onnx_dir, threads=1)
    assert genai.context == plain.context == 128
    for prompt in prompts:
        targets = [0, 1, 2, 3, 9]
        np.testing.assert_allclose(
            trace(genai, prompt, targets), trace(plain, prompt, targets), atol=1e-4
        )
    whole = [5 + i % 300 for i in range(128)]
    first = genai.prefill(whole[:20])
    genai.prefill(whole[:64])
    genai.extend(whole[64:127])
    np.testing.assert_allclose(genai.step(whole[127]), plain.prefill(whole), atol=1e-4)
    with pytest.raises(InputError, match="1 tokens after 128; expected 1 to 0"):
        genai.step(5)
    np.testing.assert_array_equal(genai.prefill(whole[:20]), first)


def test_a_bundle_by_one_runner_against_the_other(
    base_dir: Path, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    """Each part of it, with its adapter on both sides: anything else would be far off."""
    bundle = tmp_path / "bundle"
    to_onnx_bundle(base_dir, {"one": adapter_dirs[0]}, bundle, precision="int8")
    report = validate(
        bundle,
        base_dir,
        bundle=Bundle({"one": adapter_dirs[0]}),
        out=tmp_path / "checked",
        options=Options(threads=1, against=Artifact.read(bundle), runner="genai"),
    )
    assert report.passed
    base, one = json.loads((tmp_path / "checked" / "parity.json").read_text())["artifacts"]
    assert (base["composition"], one["composition"]) == ("base alone", "one")
    assert one["adapter"]["kl_base"] > 100 * one["adapter"]["kl_composition"]
    assert base["total"]["kl"] < 1e-6
    assert one["total"]["kl"] < 1e-6
    assert "run by onnxruntime-genai" in one["notes"][0]
    assert "stock runner" in [gate["name"] for gate in one["gates"]]


REMOTE = """
from caliport.export.artifact import Artifact
from caliport.validation.runners.open import open_runner

class Remote:
    name = "a remote device"

    def __init__(self, directory, *how):
        self._there = open_runner(Artifact.read(directory), *how)
        self.context = self._there.context

    def prefill(self, tokens):
        return self._there.prefill(tokens) + self.wrong

    def step(self, token):
        return self._there.step(token)

    def reset(self):
        self._there.reset()

    wrong = 0

def nothing(*what):
    return list(what)

class Wrong(Remote):
    @property
    def wrong(self):
        import numpy
        return 9 * numpy.sin(numpy.arange(384)).astype(numpy.float32)
"""


def test_anything_with_the_protocol_is_held_to_the_same_gates(
    scene: Scene, onnx_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere.py").write_text(REMOTE)
    monkeypatch.syspath_prepend(tmp_path)
    artifact, found = Artifact.read(onnx_dir), {}
    for name in ("Remote", "Wrong"):
        result = validate_against(
            Execution(artifact, runner=open_runner(artifact, 1, None, f"elsewhere:{name}")),
            Criteria(scene.evaluation, scene.fp32, scene.base_answers, limits_for("int4")),
            "int4",
            Caption("both"),
        )
        assert "run by a remote device" in result.notes[0]
        found[name] = {gate.name for gate in result.gates if not gate.passed}
    assert found["Remote"] == set()
    assert {"one by one", "next-token distribution"} <= found["Wrong"]
    with pytest.raises(InputError, match="elsewhere:REMOTE"):
        open_runner(artifact, 1, None, "elsewhere:REMOTE")
    with pytest.raises(InputError, match="gave list, expected an object with name, context"):
        open_runner(artifact, 1, None, "elsewhere:nothing")


_RUNS = """
import sys, caliport
from pathlib import Path
from caliport.validation.runners.genai import GenaiRunner
for runner in (caliport.load(sys.argv[1]), GenaiRunner(Path(sys.argv[1]), threads=1)):
    runner.prefill([1, 2, 3])
"""


def test_onnx_runtime_sends_no_usage_events(base_dir: Path, tmp_path: Path) -> None:
    """It keeps an id of the machine in the home as soon as it is loaded to send any."""
    artifact = to_onnx(base_dir, tmp_path / "art")
    home = tmp_path / "home"
    home.mkdir()
    unset = ("ORT_DISABLE_TELEMETRY", "HOME", "XDG_CACHE_HOME")
    kept = {key: value for key, value in ENVIRONMENT.items() if key not in unset}
    kept |= {"HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _RUNS, str(artifact)]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in home.rglob("*") if path.is_file()] == []
