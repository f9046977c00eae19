"""The error budget: its measures by hand, and residual streams of a real model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from caliport.core.checkpoints import load_tokenizer
from caliport.validation.evaluation.budget import (
    StageAnswers,
    distance_by_layer,
    measured,
    with_stage,
)
from caliport.validation.evaluation.evaluation import Answers, Evaluation, eager_answers
from caliport.validation.records.budget import Budget, BudgetStage
from tests.validation.conftest import Scene

THREE_TO_ONE = math.log(3)


def evaluation_of(tokenizer: object, targets: list[list[int]], *references: str) -> Evaluation:
    prompts = [[1]] * len(targets)
    return Evaluation(
        tokenizer,  # type: ignore[arg-type]
        prompts,
        [None] * len(targets),
        list(references) or None,
        targets,
        frozenset(),
        8,
    )


def logits(*rows: tuple[float, float]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_two_answers_by_hand(base_dir: Path) -> None:
    """Two prompts of two positions and one; tokens have chances 1/2 and 1/2, or 3/4 and 1/4."""
    tokenizer = load_tokenizer(base_dir)
    right, wrong = (tokenizer.encode(t, add_special_tokens=False) for t in ("the park", "tennis"))
    evaluation = evaluation_of(tokenizer, [[0, 1], [0]], "the park", "the park")
    even, leaning = (0.0, 0.0), (THREE_TO_ONE, 0.0)
    one = Answers("one", [logits(even, even), logits(even)], [right, right])
    two = Answers("two", [logits(leaning, even), logits(even)], [right, wrong])
    three = Answers("three", [logits(leaning, even), logits((0.0, THREE_TO_ONE))], None)
    first, second, third = measured(
        evaluation,
        [
            StageAnswers("exact sum", "a", one),
            StageAnswers("merge", "b", two),
            StageAnswers("calibration", "c", three),
        ],
        "rougeL",
    )
    assert (first.previous, first.first, first.by_position) == (None, None, ())
    assert first.perplexity == pytest.approx(2)
    assert [stage.task for stage in (first, second, third)] == [100, 50, None]
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert second.previous == second.first
    assert second.previous is not None
    assert second.previous.kl == pytest.approx(kl / 3)
    assert second.previous.max_abs == pytest.approx(THREE_TO_ONE)
    assert second.previous.top1 == 1
    assert second.by_position == pytest.approx((kl / 2, 0))
    assert second.perplexity == pytest.approx((0.75 * 0.5 * 0.5) ** (-1 / 3))
    assert third.previous is not None
    assert third.first is not None
    assert third.previous.kl == pytest.approx(kl / 3)
    assert third.previous.top1 == pytest.approx(2 / 3)
    assert third.first.kl == pytest.approx(2 * kl / 3)
    assert third.by_position == pytest.approx((kl / 2, 0))
    assert third.perplexity == pytest.approx((0.75 * 0.5 * 0.25) ** (-1 / 3))


@given(arrays(np.float32, (3, 5), elements=st.floats(-30, 30, width=32)))
def test_stages_that_say_the_same_lose_nothing(rows: np.ndarray) -> None:
    evaluation = evaluation_of(None, [[0, 2, 4]])
    same = [Answers(name, [rows.copy()], None, [rows.copy()[None]]) for name in "abc"]
    steps = [StageAnswers("calibration", answers.name, answers) for answers in same]
    begun, *stages = measured(evaluation, steps, "rougeL")
    for stage in stages:
        assert stage.previous == stage.first
        assert stage.previous is not None
        assert (stage.previous.max_abs, stage.previous.kl, stage.previous.top1) == (0, 0, 1)
        assert stage.perplexity == begun.perplexity
        assert stage.by_position == (0, 0, 0)
        assert stage.by_layer == (0,)


def test_later_stages_stand_behind_those_of_their_form() -> None:
    def stage(name: str, form: str, perplexity: float = 2) -> BudgetStage:
        return BudgetStage.model_validate(
            {"stage": name, "label": name, "form": form, "perplexity": perplexity}
        )

    shared = stage("calibration", "")
    forms = [stage("artifact", "onnx-int4"), stage("artifact", "onnx-int8")]
    budget = Budget(composition="both", metric=None, stages=(shared, *forms))
    device = stage("device", "onnx-int4")
    found = with_stage(budget, device)
    assert found.stages == (shared, forms[0], device, forms[1])
    again = stage("device", "onnx-int4", 3)
    assert with_stage(found, again).stages == (shared, forms[0], again, forms[1])


def test_residual_streams_show_the_layer_that_changed(scene: Scene) -> None:
    """The last stream is what the head reads before the norm; earlier layers know of no change."""
    model = scene.composed
    found = eager_answers(model, "composed", scene.evaluation, write=False, streams=True)
    assert found.streams is not None
    for streams, expected in zip(found.streams, found.logits, strict=True):
        assert streams.shape == (3, len(expected), 64)
        with torch.no_grad():
            ours = model.lm_head(model.model.norm(torch.from_numpy(streams[-1])))
        np.testing.assert_allclose(ours.numpy(), expected, atol=1e-4)
    weight = model.model.layers[1].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight *= 1.1
        changed = eager_answers(model, "changed", scene.evaluation, write=False, streams=True)
        weight.copy_(kept)
    before, first, last = distance_by_layer(found.streams, changed.streams)
    assert (before, first) == (0, 0)
    assert 0 < last < 1
