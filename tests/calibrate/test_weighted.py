"""LoraHub and LM-Cocktail on losses whose best weights are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caliport.calibrate import LowRankUpdate
from caliport.calibrate.merges.by_loss.lm_cocktail import lm_cocktail
from caliport.calibrate.merges.by_loss.lorahub import lorahub
from caliport.calibrate.merges.exact import exact
from caliport.calibrate.merges.linear import linear
from caliport.core.errors import InputError


def update(seed: int, rank: int = 2, module: str = "m") -> LowRankUpdate:
    draw = torch.Generator().manual_seed(seed)
    return LowRankUpdate(
        {module: torch.randn(rank, 5, generator=draw)},
        {module: torch.randn(7, rank, generator=draw)},
    )


class Distance:
    """The squared distance of ΔW from a wanted one; counts how often it is asked."""

    def __init__(self, wanted: torch.Tensor) -> None:
        self.wanted, self.calls = wanted, 0

    def __call__(self, merged: LowRankUpdate) -> float:
        self.calls += 1
        return float((merged.delta("m") - self.wanted).square().sum() / self.wanted.square().sum())


@pytest.mark.parametrize("wanted", [(1.2, -0.4), (0.3, 0.9), (1.0, 0.0)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lorahub_recovers_the_best_weights(wanted: tuple[float, float], seed: int) -> None:
    updates = [update(0), update(1)]
    loss = Distance(linear(updates, wanted).delta("m"))
    merged, weights = lorahub(updates, loss, seed=seed, l1=0.0)
    assert loss.calls <= 40
    # w and −w give the same ΔW.
    sign = math.copysign(1.0, weights[0] * wanted[0] + weights[1] * wanted[1])
    assert [sign * w for w in weights] == pytest.approx(wanted, abs=0.03)
    assert torch.equal(merged.delta("m"), linear(updates, weights).delta("m"))
    assert loss(merged) < 1e-3
    assert loss(linear(updates)) > 0.1, "1/N is far from the best"
    assert lorahub(updates, loss, seed=seed, l1=0.0)[1] == weights, "same seed, same result"


def test_lorahub_pulls_weights_to_0() -> None:
    updates = [update(0), update(1)]
    loss = Distance(linear(updates, [1.0, 0.3]).delta("m"))
    free, pulled = (lorahub(updates, loss, l1=l1)[1] for l1 in (0.0, 2.0))
    assert sum(map(abs, pulled)) < sum(map(abs, free)) - 0.2


def test_lorahub_stays_within_its_bound() -> None:
    updates = [update(0), update(1)]
    loss = Distance(linear(updates, [3.0, -3.0]).delta("m"))
    _, weights = lorahub(updates, loss, bound=0.8)
    assert all(abs(w) <= 0.8 for w in weights)
    assert min(abs(w) for w in weights) > 0.7


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 99))
def test_lorahub_never_exceeds_its_budget_nor_the_loss_of_1_n(
    evaluations: int, adapters: int, seed: int
) -> None:
    updates = [update(index) for index in range(adapters)]
    loss = Distance(update(50).delta("m"))
    merged, weights = lorahub(updates, loss, evaluations, seed=seed)
    assert 1 <= loss.calls <= evaluations
    plain = loss(linear(updates)) + 0.05 / adapters
    found = loss(merged) + 0.05 * sum(map(abs, weights)) / adapters
    assert found <= plain + 1e-9


def test_lorahub_survives_a_loss_that_overflows() -> None:
    updates = [update(0), update(1)]
    wanted = linear(updates, [0.2, 0.4]).delta("m")

    def loss(merged: LowRankUpdate) -> float:
        error = float((merged.delta("m") - wanted).square().mean())
        return float("nan") if error > 1 else error

    _, weights = lorahub(updates, loss, l1=0.0)
    assert loss(linear(updates, weights)) < 0.05


def given_losses(losses: list[float]) -> Callable[[LowRankUpdate], float]:
    """A loss that returns these values, one per call."""
    values = iter(losses)
    return lambda _: next(values)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 20), min_size=1, max_size=5),
    st.floats(0.1, 50),
)
def test_lm_cocktail_is_a_softmax(losses: list[float], temperature: float) -> None:
    updates = [update(index, rank=index + 1) for index in range(len(losses))]
    merged, weights = lm_cocktail(updates, given_losses(losses), temperature)
    # Relative to the lowest, so that nothing underflows to 0/0.
    shares = [math.exp(-(loss - min(losses)) / temperature) for loss in losses]
    assert weights == pytest.approx([share / sum(shares) for share in shares])
    wanted = exact(updates, weights).delta("m")
    torch.testing.assert_close(merged.delta("m"), wanted)


def test_lm_cocktail_defaults_to_the_papers_temperature() -> None:
    _, weights = lm_cocktail([update(0), update(1)], given_losses([1.0, 6.0]))
    assert weights == pytest.approx([math.e / (1 + math.e), 1 / (1 + math.e)])


def refused(call: object, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)


def test_settings_out_of_range() -> None:
    two = [update(0), update(1)]
    loss = Distance(two[0].delta("m"))
    refused(lambda: lorahub([], loss), "at least one adapter")
    refused(lambda: lorahub([update(0), update(1, rank=3)], loss), "equal ranks")
    refused(lambda: lorahub([update(0), update(1, module="n")], loss), "only one of adapters")
    refused(lambda: lorahub(two, loss, evaluations=0), "evaluations is 0, expected 1 or more")
    refused(lambda: lorahub(two, loss, l1=-1.0), "l1 is -1.0, expected 0 or more")
    refused(lambda: lorahub(two, loss, bound=0.0), "bound is 0.0, expected more than 0")
    assert loss.calls == 0
    refused(lambda: lm_cocktail([], given_losses([])), "at least one adapter")
    refused(lambda: lm_cocktail(two, given_losses([1.0, math.inf])), "loss of adapter 2 is inf")
    refused(lambda: lm_cocktail(two, loss, temperature=0.0), "temperature is 0.0")
    assert loss.calls == 0
