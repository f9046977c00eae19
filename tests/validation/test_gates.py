"""Sound runners pass every gate; a seeded fault fails the gate of its own stage."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from caliport.core.checkpoints import load_base
from caliport.core.errors import InputError
from caliport.validation.evaluation.bootstrap import bootstrap_interval, clustered_interval
from caliport.validation.evaluation.measures import compare
from caliport.validation.gates.criteria import Criteria
from caliport.validation.gates.limits import (
    Limits,
    adapter_gate,
    limits_for,
    lost_at,
    stock_gate,
    task_gate,
)
from caliport.validation.gates.verdict import check_runner
from caliport.validation.records.gate import AdapterEffect, StockResult
from caliport.validation.records.reports import Findings
from caliport.validation.runners.eager import EagerRunner
from tests.validation.conftest import Scene


def check(scene: Scene, runner: EagerRunner, limits: Limits | None = None) -> Findings:
    criteria = Criteria(
        scene.evaluation, scene.fp32, scene.base_answers, limits or limits_for("int8")
    )
    findings, _ = check_runner(runner, criteria, scene.quantized)
    return findings


def failed(findings: Findings) -> list[str]:
    return [gate.name for gate in findings.gates if not gate.passed]


class OffByOne(EagerRunner):
    """Its cache holds every token of the prompt one position too late."""

    def prefill(self, tokens: list[int]) -> np.ndarray:
        self.reset()
        self._forward([tokens[0]])
        return self._forward(tokens)


class ForgetfulSteps(EagerRunner):
    """Every step sees a cache in which the newest token of the prompt is missing."""

    def prefill(self, tokens: list[int]) -> np.ndarray:
        logits = super().prefill(tokens)
        self._cache.crop(-1)
        return logits


class Broken(EagerRunner):
    """Overflows on the third token of a text."""

    def step(self, token: int) -> np.ndarray:
        logits = super().step(token)
        if self._cache.get_seq_length() > 14:
            logits[5] = np.nan
        return logits


def test_the_quantized_model_itself_passes(scene: Scene) -> None:
    findings = check(scene, EagerRunner(scene.rounded, "sound"))
    assert failed(findings) == []
    assert findings.generation == 1
    assert findings.lowering is not None
    assert findings.lowering.kl < 1e-6
    assert findings.quantization.kl > findings.lowering.kl


def test_fp32_passes_the_tightest_limits(scene: Scene) -> None:
    criteria = Criteria(scene.evaluation, scene.fp32, scene.base_answers, limits_for("fp32"))
    findings, _ = check_runner(EagerRunner(scene.composed, "sound"), criteria, scene.exact)
    assert failed(findings) == []


def test_a_dropped_adapter_is_named(scene: Scene) -> None:
    findings = check(scene, EagerRunner(scene.base, "no adapter"))
    assert "adapter is in there" in failed(findings)
    assert lost_at(findings.gates) == "adapter"


def test_an_adapter_dropped_from_one_layer_fails_lowering(scene: Scene, base_dir: Path) -> None:
    partial = load_base(base_dir)
    with torch.no_grad():
        for (name, weight), other in zip(
            partial.named_parameters(), scene.rounded.parameters(), strict=True
        ):
            if "layers.1" not in name:
                weight.copy_(other)
    assert "decode" in failed(check(scene, EagerRunner(partial, "one layer")))


def test_a_position_off_by_one_fails_lowering(scene: Scene) -> None:
    findings = check(scene, OffByOne(scene.rounded, "off by one"))
    assert {"prefill", "one by one"} <= set(failed(findings))
    assert lost_at(findings.gates) == "lowering"


def test_a_fault_in_the_steps_alone_leaves_the_prefill_gate(scene: Scene) -> None:
    names = failed(check(scene, ForgetfulSteps(scene.rounded, "forgetful")))
    assert "decode" in names
    assert "prefill" not in names


def test_a_small_change_everywhere_and_a_large_one_in_one_place(
    scene: Scene, base_dir: Path
) -> None:
    """Both are far within what KL and favourite tokens allow."""
    other = copy.deepcopy(scene.rounded)
    for module in other.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1.1e-6
    assert "prefill, position by position" in failed(check(scene, EagerRunner(other, "epsilon")))
    row = copy.deepcopy(scene.rounded)
    with torch.no_grad():
        row.model.embed_tokens.weight[300] = row.model.embed_tokens.weight[301]
        row.lm_head.weight = torch.nn.Parameter(scene.rounded.lm_head.weight.clone())
    assert "farthest position" in failed(check(scene, EagerRunner(row, "one row")))


def test_what_a_reset_leaves_behind_is_noticed(scene: Scene) -> None:
    class Forgetless(EagerRunner):
        def reset(self) -> None:
            if self._cache is not None and self._cache.get_seq_length() > 100:
                self._cache.crop(1 - self._cache.get_seq_length())
            else:
                super().reset()

    findings = check(scene, Forgetless(scene.rounded, "forgetless"))
    assert failed(findings) == ["forgetting"]


def test_nan_logits_fail_with_their_place(scene: Scene) -> None:
    findings = check(scene, Broken(scene.rounded, "broken"))
    (gate,) = findings.gates
    assert not gate.passed
    assert gate.found is None
    assert "broken" in gate.reason
    assert "1 of 384 logits are NaN" in gate.reason
    assert findings.lowering is None


def test_quantization_that_costs_too_much_is_named(scene: Scene) -> None:
    rounded = scene.quantized.said.answers.logits
    cost = compare(scene.fp32.logits, rounded, scene.evaluation.targets).kl
    limits = limits_for("int8", quantization_kl=cost / 2)
    findings = check(scene, EagerRunner(scene.rounded, "coarse"), limits)
    assert failed(findings) == ["next-token distribution"]
    assert lost_at(findings.gates) == "quantization"


def test_a_composition_that_changes_nothing_has_no_adapter_to_find() -> None:
    same = AdapterEffect(kl_base=0, kl_composition=0, effect=0)
    assert adapter_gate(same, True, limits_for("fp32")).passed


@pytest.mark.parametrize(("lowered", "stage"), [(True, "quantization"), (False, "lowering")])
def test_far_from_both_is_not_put_down_to_the_adapter(lowered: bool, stage: str) -> None:
    far = AdapterEffect(kl_base=3, kl_composition=3, effect=1)
    gate = adapter_gate(far, lowered, limits_for("int4"))
    assert not gate.passed
    assert gate.stage == stage


@pytest.mark.parametrize(
    ("loss", "noise", "examples", "passed", "decided"),
    [
        (0.0, 0.5, 100, True, True),
        (20.0, 0.5, 100, False, True),
        (4.0, 30.0, 10, True, False),
    ],
)
def test_task_gate_says_yes_no_or_too_few(
    loss: float, noise: float, examples: int, passed: bool, decided: bool
) -> None:
    rng = np.random.default_rng(1)
    fp32 = rng.uniform(20, 80, examples)
    artifact = fp32 - loss + noise * rng.standard_normal(examples)
    gate, (low, high) = task_gate("rougeL", fp32.tolist(), artifact.tolist(), limits_for("int4"))
    assert (gate.passed, gate.decided) == (passed, decided)
    assert low <= float(np.mean(artifact - fp32)) <= high
    assert ("would be enough" in gate.reason) is not decided


def test_bootstrap_interval_is_near_the_normal_one() -> None:
    values = np.random.default_rng(0).standard_normal(400)
    low, high = bootstrap_interval(values, 0.95)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    assert bootstrap_interval(values, 0.95) == (low, high)


def test_three_seeds_that_differ_are_three_numbers() -> None:
    """Their examples do not make them more: Student's t over the seeds' means."""
    draw = np.random.default_rng(0)
    means = np.array([2.0, 6.0, 12.0])
    values = (means[:, None] + 0.1 * draw.standard_normal((3, 200))).ravel()
    seeds, items = np.repeat(range(3), 200), np.tile(range(200), 3)
    low, high = clustered_interval(values, seeds.tolist(), items.tolist(), 0.95)
    half = 4.303 * means.std(ddof=1) / 3**0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    pooled = bootstrap_interval(values, 0.95)
    assert (high - low) > 10 * (pooled[1] - pooled[0])


@pytest.mark.parametrize("seeds", [1, 5])
def test_a_clustered_interval_covers_the_mean(seeds: int) -> None:
    """In 95 % of 300 draws of seeds, images and what both do together."""
    draw = np.random.default_rng(seeds)
    inside, wide = 0, []
    for _ in range(300):
        effects = draw.standard_normal((seeds, 1)) * (seeds > 1) + draw.standard_normal((1, 40))
        values = (effects + draw.standard_normal((seeds, 40)))[:, :, None].repeat(2, axis=2)
        index = np.indices(values.shape).reshape(3, -1)
        low, high = clustered_interval(values.ravel(), list(index[0]), list(index[1]), 0.95)
        inside += low <= 0 <= high
        wide.append(high - low)
    assert inside / 300 == pytest.approx(0.95, abs=0.03)
    if seeds == 1:  # over images, each measured twice
        assert np.mean(wide) == pytest.approx(2 * 2.02 * (2 / 40) ** 0.5, rel=0.1)


def test_a_clustered_interval_of_one_value_is_endless() -> None:
    assert clustered_interval(np.array([1.0, 2.0]), [0, 0], ["a", "a"], 0.95) == (-np.inf, np.inf)


def test_stock_runner_must_agree() -> None:
    stock = StockResult(runner="TextLLMRunner", matches=3, examples=4)
    assert stock_gate(stock, limits_for("int8")).passed
    assert not stock_gate(stock, limits_for("fp32")).passed


def test_limits_are_changed_by_name() -> None:
    assert limits_for("int4", margin=1.5).margin == 1.5
    with pytest.raises(InputError, match="'fp8' has no limits, expected one of fp32, int8, int4"):
        limits_for("fp8")
    with pytest.raises(InputError, match="limit 'marge' is not known"):
        limits_for("int4", marge=1)
