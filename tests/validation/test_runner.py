from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from caliport_core.checkpoints import load_base
from caliport_core.errors import InputError
from validation.parity import one_by_one, trace
from validation.runner import EagerRunner, greedy, open_runner


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
        open_runner(tmp_path, threads=1)
