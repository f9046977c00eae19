"""The audit against the same figures computed from dense matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from caliport.calibrate import LowRankUpdate
from caliport.calibrate.audit import (
    audit_merge,
    audit_module,
    check_one_base,
    departure,
    inner,
    norm_of,
)
from caliport.calibrate.merges.common import Merge
from caliport.calibrate.merges.exact import exact
from caliport.calibrate.merges.registry import MERGES
from caliport.core.errors import InputError

OUT, IN = 9, 12


def update(
    seed: int, rank: int, modules: tuple[str, ...] = ("x",), out: int = OUT
) -> LowRankUpdate:
    draw = torch.Generator().manual_seed(seed)
    return LowRankUpdate(
        {n: torch.randn(rank, IN, generator=draw) for n in modules},
        {n: torch.randn(out, rank, generator=draw) for n in modules},
    )


def dense(u: LowRankUpdate) -> np.ndarray:
    return (u.b["x"].double() @ u.a["x"].double()).numpy()


def basis(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix)[0][:, : np.linalg.matrix_rank(matrix)]


seeds = st.integers(0, 10_000)
ranks = st.integers(1, 14)  # also beyond what a [9, 12] matrix can have


@given(seeds, ranks, seeds, ranks)
def test_norms_ranks_and_angles_are_those_of_the_dense_updates(
    seed: int, rank: int, other_seed: int, other_rank: int
) -> None:
    updates = [update(seed, rank), update(other_seed + 20_000, other_rank)]
    found = audit_module(updates, "x")
    one, other = map(dense, updates)
    assert found.shape == (OUT, IN)
    for part, u, matrix in zip(found.parts, updates, (one, other), strict=True):
        assert part is not None
        values = np.linalg.svd(matrix, compute_uv=False)
        shares = values / values.sum()
        shares = shares[shares > 1e-12]
        assert part.norm == pytest.approx(np.linalg.norm(matrix))
        assert part.rank == u.rank("x")
        assert part.numerical_rank == np.linalg.matrix_rank(matrix) == min(u.rank("x"), OUT)
        assert part.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    (pair,) = found.overlaps
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    assert pair.cosine == pytest.approx((one * other).sum() / norms, abs=1e-9)
    for cosines, left, right in (
        (pair.columns, one, other),
        (pair.rows, one.T, other.T),
    ):
        wanted = np.cos(subspace_angles(basis(left), basis(right)))
        assert cosines.mean == pytest.approx(wanted.mean(), abs=1e-6)
        assert cosines.highest == pytest.approx(wanted.max(), abs=1e-6)


@given(
    st.lists(st.tuples(seeds, st.sampled_from([-2, -1, -0.5, 0, 0.25, 1])), min_size=2, max_size=4),
    st.integers(1, 6),
    st.sampled_from(sorted(MERGES)),
)
def test_errors_are_those_of_the_dense_merges(
    parts: list[tuple[int, float]], rank: int, merge: str
) -> None:
    updates = [update(seed, rank) for seed, _ in parts]
    weights = [weight for _, weight in parts]
    wanted = exact(updates, weights)
    found = audit_merge(updates, weights, wanted, MERGES[merge])
    if found.refused is not None:
        with pytest.raises(InputError, match=re.escape(found.refused)):
            MERGES[merge](updates, weights)
        return
    merged = MERGES[merge](updates, weights)
    total = sum(w * dense(u) for w, u in zip(weights, updates, strict=True))
    size = np.linalg.norm(total)
    scale = max(np.linalg.norm(w * dense(u)) for w, u in zip(weights, updates, strict=True))
    gone = np.linalg.norm(dense(merged) - total)
    assert found.departures["x"].residual == pytest.approx(gone, abs=1e-6 * max(scale, gone))
    if size > 1e-3 * scale:
        assert found.total.error == pytest.approx(gone / size, rel=1e-3, abs=1e-3)
        kept = (dense(merged) * total).sum() / size**2
        assert found.total.kept == pytest.approx(kept, rel=1e-3, abs=1e-3)
        assert found.total.rest is not None
        assert math.hypot(1 - kept, found.total.rest) == pytest.approx(
            gone / size, rel=1e-2, abs=1e-2
        )


@given(seeds, st.integers(1, 6), st.lists(st.floats(0.1, 2), min_size=3, max_size=3))
def test_exact_is_called_exact(seed: int, rank: int, weights: list[float]) -> None:
    updates = [update(seed + i, rank, ("x", "y")) for i in range(3)]
    found = audit_merge(updates, weights, exact(updates, weights), MERGES["exact"])
    assert found.verdict == "exact"
    assert found.text == "equal to the weighted sum up to rounding"


def merge_of(name: str, function: Callable[..., LowRankUpdate]) -> Merge:
    return Merge(name, name, "this test", "", "", function)


def scaled(factor: float):
    """A merge that is exactly ``factor`` times the sum, so that its error is |1 − factor|."""

    def merge(updates, weights):
        whole = exact(updates, weights)
        return LowRankUpdate(whole.a, {n: factor * b for n, b in whole.b.items()})

    return merge


@pytest.mark.parametrize(
    ("factor", "verdict", "says"),
    [
        (1 + 1e-7, "exact", "equal to the weighted sum"),
        (0.95, "close", "close to exact, relative error 0.05 over all modules: it is 0.95 times"),
        (0.6, "approximate", "approximate, relative error 0.40"),
        (0.45, "far", "far from exact, relative error 0.55 over all modules: it is 0.45 times"),
        (-0.5, "far", "relative error 1.50 over all modules, no closer than no adapter at all"),
    ],
)
def test_verdicts_in_words(factor: float, verdict: str, says: str) -> None:
    updates = [update(1, 3), update(2, 3)]
    wanted = exact(updates)
    found = audit_merge(updates, [0.5, 0.5], wanted, merge_of("mine", scaled(factor)))
    assert found.verdict == verdict
    assert says in found.text
    assert "cross terms" not in found.text


def test_far_from_exact_leaves_less_than_three_quarters_of_the_energy() -> None:
    """The limit's meaning: at an error of 0.5 the worst merge has 3/4 of its energy on the sum."""
    total = np.array([1.0, 0.0])
    around = [0.5 * np.array([math.cos(t), math.sin(t)]) for t in np.linspace(0, 2 * math.pi, 999)]
    shares = [(total @ (total + d)) ** 2 / ((total + d) @ (total + d)) for d in around]
    assert min(shares) == pytest.approx(0.75, abs=1e-4)


def test_linear_is_far_from_exact_for_adapters_that_share_nothing() -> None:
    updates = [update(1, 2), update(2, 2)]
    found = audit_merge(updates, [0.5, 0.5], exact(updates), MERGES["linear"])
    assert found.verdict == "far"
    assert "cross terms Bᵢ·Aⱼ" in found.text


def test_global_error_weighs_modules_by_their_size() -> None:
    updates = [update(1, 2, ("x", "y")), update(2, 2, ("x", "y"))]
    wanted = exact(updates)
    merged = LowRankUpdate(wanted.a, {"x": 0 * wanted.b["x"], "y": wanted.b["y"]})
    found = audit_merge(
        updates, [0.5, 0.5], wanted, merge_of("half", lambda updates, weights: merged)
    )
    x, y = norm_of(wanted, "x"), norm_of(wanted, "y")
    assert found.departures["x"].error == pytest.approx(1)
    assert found.departures["y"].error == pytest.approx(0, abs=1e-7)
    assert found.total.error == pytest.approx(x / math.hypot(x, y))


def test_module_that_a_merge_leaves_out_is_lost() -> None:
    wanted = exact([update(1, 2, ("x", "y")), update(2, 2, ("x", "y"))])
    merged = LowRankUpdate({"x": wanted.a["x"]}, {"x": wanted.b["x"]})
    assert departure(merged, wanted, "y").error == 1
    assert departure(merged, wanted, "y").kept == 0


def test_sum_that_cancels_has_no_relative_error() -> None:
    updates = [update(1, 3), update(1, 3)]
    wanted = exact(updates, [1.0, -1.0])
    found = audit_merge(
        updates, [1.0, -1.0], wanted, merge_of("first", lambda updates, weights: updates[0])
    )
    assert found.verdict == "undefined"
    assert found.total.error is found.total.kept is found.total.rest is None
    assert found.departures["x"].residual == pytest.approx(norm_of(updates[0], "x"))
    assert found.text == "no relative error: the weighted sum is zero"


def test_refusal_is_a_finding() -> None:
    updates = [update(1, 2), update(2, 3)]
    found = audit_merge(updates, [0.5, 0.5], exact(updates), MERGES["linear"])
    assert found.verdict == "does not apply"
    assert found.text.startswith("does not apply: x has rank 2 in adapter 1 and 3 in adapter 2")


def test_same_direction_written_by_rotated_factors() -> None:
    """Overlap is about ΔW: another B and A of the same product change nothing."""
    one = update(3, 4)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    other = LowRankUpdate({"x": turn.T @ one.a["x"]}, {"x": one.b["x"] @ turn})
    (pair,) = audit_module([one, other], "x").overlaps
    assert pair.cosine == pytest.approx(1)
    assert pair.columns.mean == pair.rows.mean == pytest.approx(1)
    assert inner(one, other, "x") == pytest.approx(norm_of(one, "x") ** 2)


def test_chance_is_what_random_spaces_have() -> None:
    squares = []
    for seed in range(200):
        (pair,) = audit_module([update(seed, 1), update(seed + 1000, 1)], "x").overlaps
        squares.append(pair.columns.mean**2)
    assert math.sqrt(np.mean(squares)) == pytest.approx(pair.columns.chance, rel=0.15)


def test_untrained_and_absent_updates_have_no_overlap() -> None:
    """B starts at zero: an adapter that was never trained there has no space to compare."""
    zero = update(1, 3)
    zero = LowRankUpdate(zero.a, {"x": 0 * zero.b["x"]})
    found = audit_module([update(2, 3), zero, update(3, 3, ("y",))], "x")
    assert found.overlaps == ()
    assert found.parts[1] is not None
    assert (found.parts[1].norm, found.parts[1].numerical_rank) == (0, 0)
    assert found.parts[1].effective_rank == 0
    assert found.parts[2] is None
    with pytest.raises(ValueError, match="no adapter updates it"):
        audit_module([update(2, 3)], "z")


@pytest.mark.parametrize(
    ("updates", "says"),
    [
        ({"a": update(1, 2)}, "found 1, expected 2 or more"),
        (
            {"a": update(1, 2), "b": update(1, 2, ("y",)), "c": update(1, 2, out=7)},
            r"x: adapter a updates a \[9, 12\] weight, adapter c one of \[7, 12\]",
        ),
    ],
)
def test_bad_input(updates: dict[str, LowRankUpdate], says: str) -> None:
    with pytest.raises(InputError, match=says):
        check_one_base(updates)
