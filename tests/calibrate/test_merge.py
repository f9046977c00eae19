"""Merges against the equations written out, over any shapes and ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibrate import LowRankUpdate
from calibrate.merge import exact, linear
from caliport_core.errors import InputError


def update(seed: int, rank: int, modules: tuple[str, ...] = ("x.q", "x.v")) -> LowRankUpdate:
    draw = torch.Generator().manual_seed(seed)
    return LowRankUpdate(
        {n: torch.randn(rank, 5, generator=draw) for n in modules},
        {n: torch.randn(7, rank, generator=draw) for n in modules},
    )


@given(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.integers(1, 6))
def test_linear_is_equation_5(seeds: list[int], rank: int) -> None:
    updates = [update(seed, rank) for seed in seeds]
    merged = linear(updates)
    for name in merged.modules:
        b = torch.zeros(7, rank)
        a = torch.zeros(rank, 5)
        for u in updates:
            b += u.b[name] / len(updates)
            a += u.a[name] / len(updates)
        torch.testing.assert_close(merged.delta(name), b @ a, rtol=1e-4, atol=1e-5)


@given(
    st.lists(
        st.tuples(st.integers(0, 99), st.integers(1, 6), st.floats(-2, 2)), min_size=1, max_size=4
    )
)
def test_exact_is_the_weighted_sum(parts: list[tuple[int, int, float]]) -> None:
    updates = [update(seed, rank) for seed, rank, _ in parts]
    weights = [weight for _, _, weight in parts]
    merged = exact(updates, weights)
    for name in merged.modules:
        wanted = sum(w * u.delta(name) for w, u in zip(weights, updates, strict=True))
        torch.testing.assert_close(merged.delta(name), wanted, rtol=1e-4, atol=1e-4)
        assert merged.rank(name) == sum(rank for _, rank, _ in parts)


def test_exact_keeps_modules_of_one() -> None:
    one, other = update(0, 2, ("x.q",)), update(1, 3, ("x.q", "x.v"))
    merged = exact([one, other], [1.0, 1.0])
    torch.testing.assert_close(merged.delta("x.v"), other.delta("x.v"))
    torch.testing.assert_close(merged.delta("x.q"), one.delta("x.q") + other.delta("x.q"))


@pytest.mark.parametrize(
    ("updates", "weights", "says"),
    [
        ([], None, "at least one adapter"),
        ([update(0, 2), update(1, 3)], None, "equal ranks"),
        ([update(0, 2), update(1, 2, ("x.q",))], None, "only one of adapters"),
        ([update(0, 2), update(1, 2)], [1.0], "1 weights for 2 adapters"),
    ],
)
def test_linear_refuses(
    updates: list[LowRankUpdate], weights: list[float] | None, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        linear(updates, weights)
