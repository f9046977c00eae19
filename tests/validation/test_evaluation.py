from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from caliport.core.checkpoints import encode_prompt, load_base, load_tokenizer
from caliport.core.errors import InputError
from caliport.validation.evaluation.evaluation import eager_answers, make_evaluation, runner_answers
from caliport.validation.evaluation.prompts import builtin_prompts
from caliport.validation.runners.eager import EagerRunner
from tests.validation.conftest import Scene


@given(st.integers(4, 200_000), st.sets(st.integers(0, 2)), st.integers(1, 100))
def test_builtin_prompts_suit_any_vocabulary(vocab: int, special: set[int], longest: int) -> None:
    prompts = builtin_prompts(vocab, special, count=5, longest=longest)
    assert prompts == builtin_prompts(vocab, special, count=5, longest=longest)
    assert [len(p) for p in prompts] == sorted(len(p) for p in prompts)
    assert len(prompts[0]) == 1
    assert len(prompts[-1]) == longest
    assert all(0 <= t < vocab and t not in special for p in prompts for t in p)


def test_builtin_prompts_need_one_ordinary_token() -> None:
    with pytest.raises(InputError, match="no room for the built-in prompts"):
        builtin_prompts(3, {0, 1, 2})


def test_without_inputs_the_builtin_set_is_asked(base_dir: Path) -> None:
    model, tokenizer = load_base(base_dir), load_tokenizer(base_dir)
    found = make_evaluation(model, tokenizer, max_new_tokens=4, positions=4)
    assert len(found.prompts) == len(found.texts) == len(found.targets) > 16
    assert found.references is None
    assert found.texts[0] is not None
    assert found.texts[-1] is None
    assert all(1 <= len(target) <= 4 for target in found.targets)
    assert all(len(p) + 4 <= 128 for p in found.prompts)


def test_targets_are_the_references_and_their_end(base_dir: Path) -> None:
    model, tokenizer = load_base(base_dir), load_tokenizer(base_dir)
    found = make_evaluation(model, tokenizer, ["tennis"], ["the park"], positions=40)
    assert found.prompts == [encode_prompt(tokenizer, "tennis")]
    assert found.targets[0][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(found.targets[0][:-1]) == "the park"


def test_answers_by_steps_and_in_one_pass_are_the_same(scene: Scene) -> None:
    stepped = runner_answers(EagerRunner(scene.composed, "steps"), scene.evaluation)
    assert stepped.generated == scene.fp32.generated
    for ours, theirs in zip(stepped.logits, scene.fp32.logits, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-4)


@pytest.mark.parametrize(
    ("inputs", "references", "message"),
    [
        ([], None, "0 prompts to validate with, expected at least one"),
        (["a"], ["b", "c"], "1 prompts to validate with, expected 2, one a reference"),
        (["word " * 300], None, "prompt 1 of 1: a prompt of 1503 tokens leaves no room"),
    ],
)
def test_wrong_inputs_are_one_line(
    base_dir: Path, inputs: list[str], references: list[str] | None, message: str
) -> None:
    model, tokenizer = load_base(base_dir), load_tokenizer(base_dir)
    with pytest.raises(InputError, match=message):
        make_evaluation(model, tokenizer, inputs, references)


def test_a_reference_model_must_be_sound(base_dir: Path, scene: Scene) -> None:
    broken = load_base(base_dir)
    with torch.no_grad():
        next(broken.parameters())[:] = float("nan")
    with pytest.raises(InputError, match="fp32: logits are NaN or infinite before any export"):
        eager_answers(broken, "fp32", scene.evaluation)


def test_a_context_too_short_is_bad_input(scene: Scene) -> None:
    runner = EagerRunner(scene.composed, "short")
    runner.context = 12
    with pytest.raises(InputError, match="exceed its context of 12"):
        runner_answers(runner, scene.evaluation)
