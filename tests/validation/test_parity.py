from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from caliport.validation.evaluation.measures import (
    EXACT,
    NotFinite,
    compare,
    distances,
    finite,
    kl_divergence,
    unexplained,
)

LOGITS = arrays(np.float32, (3, 7), elements=st.floats(-30, 30, width=32))


def naive_kl(reference: np.ndarray, found: np.ndarray) -> list[float]:
    """Written out from the definition, one probability at a time."""
    result = []
    for row, other in zip(reference.tolist(), found.tolist(), strict=True):
        z, y = sum(map(math.exp, row)), sum(map(math.exp, other))
        result.append(
            sum(
                math.exp(a) / z * (math.log(math.exp(a) / z) - math.log(math.exp(b) / y))
                for a, b in zip(row, other, strict=True)
            )
        )
    return result


@given(LOGITS, LOGITS)
def test_kl_is_its_definition_and_never_negative(p: np.ndarray, q: np.ndarray) -> None:
    found = kl_divergence(p, q)
    assert (found >= 0).all()
    np.testing.assert_allclose(found, naive_kl(p, q), rtol=1e-6, atol=1e-9)


@given(LOGITS, LOGITS)
def test_compare_matches_the_definitions(p: np.ndarray, q: np.ndarray) -> None:
    targets = [[0, 3, 6]]
    found = compare([p], [q], targets)
    assert found.positions == 3
    assert found.max_abs == np.abs(p - q).max()
    assert found.kl == pytest.approx(np.mean(naive_kl(p, q)), rel=1e-6, abs=1e-9)
    agree = [int(np.argmax(a) == np.argmax(b)) for a, b in zip(p, q, strict=True)]
    assert found.top1 == pytest.approx(sum(agree) / 3)
    for logits, perplexity in ((q, found.perplexity), (p, found.reference_perplexity)):
        chances = [
            math.exp(row[t]) / sum(map(math.exp, row))
            for row, t in zip(logits.tolist(), targets[0], strict=True)
        ]
        assert perplexity == pytest.approx(math.prod(chances) ** (-1 / 3), rel=1e-6)


@given(LOGITS)
def test_equal_logits_have_no_distance(p: np.ndarray) -> None:
    found = compare([p], [p.copy()], [[1, 2, 3]])
    assert (found.max_abs, found.kl, found.top1) == (0, 0, 1)
    assert found.perplexity == found.reference_perplexity


@given(LOGITS, LOGITS, st.permutations(range(7)))
def test_names_of_tokens_do_not_matter(p: np.ndarray, q: np.ndarray, order: list[int]) -> None:
    moved = kl_divergence(p[:, order], q[:, order])
    np.testing.assert_allclose(moved, kl_divergence(p, q), rtol=1e-6, atol=1e-9)


@given(LOGITS, LOGITS, st.floats(-5, 5))
def test_a_constant_on_all_logits_does_not_matter(
    p: np.ndarray, q: np.ndarray, constant: float
) -> None:
    wide = q.astype(np.float64) + constant
    np.testing.assert_allclose(kl_divergence(p, wide), kl_divergence(p, q), rtol=1e-6, atol=1e-9)


def test_positions_of_all_prompts_weigh_the_same() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 5)), rng.normal(size=(6, 5))
    found = compare([one, two], [one + rng.normal(size=(2, 5)), two], [[0, 1], [2] * 6])
    alone = compare([one], [one + np.random.default_rng(0).normal(size=(2, 5))], [[0, 1]])
    assert found.positions == 8
    assert found.kl < alone.kl or alone.kl == 0


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="differ"):
        compare([np.zeros((2, 5))], [np.zeros((2, 6))], [[0, 0]])
    with pytest.raises(ValueError, match="no positions"):
        compare([np.zeros((0, 5))], [np.zeros((0, 5))], [[]])


def test_numbers_that_are_none_are_a_failure_with_its_place() -> None:
    with pytest.raises(NotFinite, match=r"step 3: 2 of 4 logits are NaN or infinite"):
        finite(np.array([0, np.nan, 1, np.inf]), "step 3")


NOISE = np.r_[np.full(60, EXACT), np.linspace(1e-3, 1e-2, 40)]


@given(st.floats(0.1, 2.9))
def test_what_rounding_explains_is_explained(times: float) -> None:
    assert unexplained(np.maximum(NOISE * times, EXACT), NOISE, 3) == 0
    assert unexplained(NOISE[::-1], NOISE, 3) == 0


@pytest.mark.parametrize(
    ("found", "share"),
    [
        (np.maximum(NOISE, 1e-4), 0.6),  # little, where rounding moves nothing
        (np.full(100, 1.0), 1.0),
        (np.r_[NOISE[:50], np.full(50, 1.0)], 0.5),
    ],
)
def test_what_rounding_does_not_explain_is_counted(found: np.ndarray, share: float) -> None:
    assert unexplained(found, NOISE, 3) == pytest.approx(share)


def test_distances_are_relative_to_the_spread_of_the_logits() -> None:
    reference = np.array([[-1.0, 0, 1], [-10.0, 0, 10], [5.0, 5, 5]])
    found = reference + np.array([[0.1, 0, 0], [0, 1.0, 0], [0, 0, 0]])
    np.testing.assert_allclose(distances([reference], [found]), [0.1, 0.1, EXACT])
