"""PEFT's ``add_weighted_adapter`` beside ours: where it is right, and where it is not.

Measured against the exact sum Σ wᵢ·ΔWᵢ by ‖ΔW − ΔW_exact‖/‖ΔW_exact‖ over all modules, on two
random adapters of the tiny base with weights 0.5. The figures are PEFT 0.21.2's. Where a test says
that PEFT is wrong, it fails once PEFT is right: then use PEFT there, or just drop the test.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import random_adapter
from peft import PeftModel
from torch import Tensor

from caliport.calibrate import LowRankUpdate, read_peft
from caliport.calibrate.merges.dare import dare
from caliport.calibrate.merges.exact import exact
from caliport.calibrate.merges.linear import linear
from caliport.calibrate.merges.slerp import slerp
from caliport.calibrate.merges.svd import svd
from caliport.calibrate.merges.ties import ties
from caliport.core.checkpoints import load_base

HALF = (0.5, 0.5)


@dataclass
class Merged:
    """The adapters as we read them, and PEFT's merge of them by module."""

    updates: list[LowRankUpdate]
    deltas: dict[str, Tensor]

    def error(self, wanted: LowRankUpdate) -> float:
        assert wanted.modules == tuple(sorted(self.deltas))
        return distance(self.deltas, wanted)


def distance(found: dict[str, Tensor], wanted: LowRankUpdate) -> float:
    square = sum((found[n] - wanted.delta(n)).square().sum() for n in wanted.modules)
    norm = sum(wanted.delta(n).square().sum() for n in wanted.modules)
    return float((torch.as_tensor(square) / torch.as_tensor(norm)).sqrt())


@pytest.fixture
def merge(base_dir: Path, tmp_path: Path) -> Callable[..., Merged]:
    """Random adapters of these kinds, merged by PEFT."""
    number = itertools.count()

    def run(kinds: list[dict], how: str, weights: tuple = HALF, **settings: object) -> Merged:
        paths = [
            random_adapter(base_dir, tmp_path / f"{next(number)}", seed=i + 1, **kind)
            for i, kind in enumerate(kinds)
        ]
        model = PeftModel.from_pretrained(load_base(base_dir), paths[0], adapter_name="adapter0")
        for i, path in enumerate(paths[1:], start=1):
            model.load_adapter(path, adapter_name=f"adapter{i}")
        torch.manual_seed(0)  # for DARE
        names = [f"adapter{i}" for i in range(len(paths))]
        model.add_weighted_adapter(names, list(weights), "all", combination_type=how, **settings)
        deltas = {
            name: module.get_delta_weight("all")
            for name, module in model.base_model.model.named_modules()
            if "all" in getattr(module, "lora_A", {})
        }
        return Merged([read_peft(path) for path in paths], deltas)

    return run


PLAIN: list[dict] = [{}, {}]
KINDS = {
    "plain": PLAIN,
    "alphas": [{"lora_alpha": 8}, {"lora_alpha": 3}],
    "ranks": [{"rank": 4, "lora_alpha": 8}, {"rank": 2, "lora_alpha": 7}],
    "modules": [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["v_proj", "o_proj"]},
    ],
    # use_rslora is taken from the first adapter, so an rsLoRA in second place does no harm.
    "rslora-second": [{}, {"use_rslora": True}],
}


@pytest.mark.parametrize("kind", KINDS)
def test_cat_and_svd_are_right(kind: str, merge: Callable[..., Merged]) -> None:
    found = merge(KINDS[kind], "cat")
    assert found.error(exact(found.updates)) < 1e-5
    found = merge(KINDS[kind], "svd", svd_rank=4)
    assert found.error(svd(found.updates, rank=4)) < 1e-5


def test_cat_is_right_with_patterns_and_any_weights(merge: Callable[..., Merged]) -> None:
    patterns = {"rank_pattern": {"q_proj": 9}, "alpha_pattern": {"up_proj": 3}}
    found = merge([patterns, {}], "cat", (1.3, -0.4))
    assert found.error(exact(found.updates, [1.3, -0.4])) < 1e-5


@pytest.mark.parametrize(
    ("how", "settings", "error"),
    [
        # A' = Σ √(wᵢsᵢ)·Aᵢ and B' likewise: the sum plus all cross terms √(wᵢwⱼ)·Bᵢ·Aⱼ.
        ("linear", {}, 1.00),
        # Signs and magnitudes of A and B apart say nothing about those of B·A.
        ("ties", {"density": 0.5}, 1.01),
        # Cross terms, and twice the dropping: the noise of A times that of B.
        ("dare_linear", {"density": 0.5}, 2.64),
    ],
)
def test_merges_of_a_and_b_apart_are_far_from_the_sum(
    how: str, settings: dict, error: float, merge: Callable[..., Merged]
) -> None:
    found = merge(PLAIN, how, **settings)
    measured = found.error(exact(found.updates))
    assert measured > 0.3
    assert measured == pytest.approx(error, abs=0.15)


@pytest.mark.parametrize(
    ("kinds", "how", "error"),
    [
        # The merge's own scaling should be 1, but use_rslora makes it √R (peft issue 3761): the
        # error is √R − 1 with R = 8 for cat, R = 4 for svd.
        ([{"use_rslora": True}, {"use_rslora": True}], "cat", 8**0.5 - 1),
        ([{"use_rslora": True}, {}], "cat", 8**0.5 - 1),
        ([{"use_rslora": True}, {"use_rslora": True}], "svd", 4**0.5 - 1),
    ],
    ids=["cat", "cat-rslora-first", "svd"],
)
def test_rslora_is_scaled_twice(
    kinds: list[dict], how: str, error: float, merge: Callable[..., Merged]
) -> None:
    found = merge(kinds, how)
    ours = exact(found.updates) if how == "cat" else svd(found.updates)
    assert found.error(ours) == pytest.approx(error, rel=1e-3)


def test_one_rslora_with_weight_1_is_not_itself(merge: Callable[..., Merged]) -> None:
    """Peft issue 3761, its plainest form; of a plain LoRA it is itself."""
    found = merge([{"use_rslora": True}], "cat", (1.0,))
    assert found.error(found.updates[0]) == pytest.approx(1.0, rel=1e-3)
    found = merge([{}], "cat", (1.0,))
    assert found.error(found.updates[0]) < 1e-5


def test_linear_is_equation_5_up_to_a_factor(merge: Callable[..., Merged]) -> None:
    """PEFT spreads √(w·s) over A and B, s = α/r; Eq. 5 (arXiv 2507.16083) multiplies each by w.

    For adapters of one s, PEFT's linear with w² is therefore Eq. 5 and our linear with w, and
    PEFT's with w = 1/N is N times Eq. 5. For different s they differ in the cross terms: √(sᵢsⱼ)
    in PEFT's, sᵢ of the B in ours, whose scaling is inside B.
    """
    found = merge(PLAIN, "linear", (0.25, 0.25))
    ours = linear(found.updates, HALF)
    assert found.error(ours) < 1e-5
    for name in ours.modules:
        a = sum(u.a[name] for u in found.updates) / 2
        b = sum(u.b[name] for u in found.updates) / 2
        torch.testing.assert_close(found.deltas[name], b @ a, rtol=1e-4, atol=1e-5)
    doubled = merge(PLAIN, "linear", HALF)
    assert distance({n: d / 2 for n, d in doubled.deltas.items()}, ours) < 1e-5
    found = merge(KINDS["alphas"], "linear", (0.25, 0.25))
    assert found.error(linear(found.updates, HALF)) > 0.1


def test_ties_on_the_dense_update_agrees(merge: Callable[..., Merged]) -> None:
    """PEFT's ties_svd with w = 1 is the paper's mean over those that agree, as ours with 1/N."""
    found = merge(PLAIN, "ties_svd", (1.0, 1.0), density=0.5, svd_rank=32)
    assert found.error(ties(found.updates, density=0.5, rank=32)) < 1e-4
    found = merge(PLAIN, "ties_svd", HALF, density=0.5, svd_rank=32)
    half = {n: 2 * d for n, d in found.deltas.items()}
    assert distance(half, ties(found.updates, density=0.5, rank=32)) < 1e-4


def test_how_far_our_own_approximations_are(adapter_dirs: list[Path]) -> None:
    """Two independent random adapters are the hardest case there is: they share no direction.

    DARE's noise has error √((1 − density)/density) = 1, but most of it lies beyond the kept rank.
    """
    updates = [read_peft(path) for path in adapter_dirs]
    wanted = exact(updates)
    errors = {
        merge.__name__: distance({n: merge(updates).delta(n) for n in wanted.modules}, wanted)
        for merge in (linear, svd, ties, dare, slerp)
    }
    expected = {"linear": 0.72, "svd": 0.56, "ties": 0.71, "dare": 0.51, "slerp": 0.41}
    assert errors == pytest.approx(expected, abs=0.05)
    whole = dare(updates, rank=160)
    assert distance({n: whole.delta(n) for n in wanted.modules}, wanted) == pytest.approx(
        1.0, abs=0.05
    )
