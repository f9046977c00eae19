"""TSV and Iso-C in Core Space against the same methods on dense updates, written out naively."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from caliport.calibrate import LowRankUpdate
from caliport.calibrate.merges.core_space import Core
from caliport.calibrate.merges.dare import dare
from caliport.calibrate.merges.exact import exact
from caliport.calibrate.merges.iso_c import iso_c
from caliport.calibrate.merges.svd import svd
from caliport.calibrate.merges.tsv import tsv

unhurried = settings(max_examples=50, deadline=None)
drawn_parts = st.lists(
    st.tuples(st.integers(0, 99), st.integers(1, 4), st.sampled_from([0.3, 0.5, 1.0, -1.0])),
    min_size=1,
    max_size=3,
    unique_by=lambda part: part[0],
)


def update(seed: int, rank: int, out: int = 16, into: int = 13) -> LowRankUpdate:
    draw = torch.Generator().manual_seed(seed)
    return LowRankUpdate(
        {"m": torch.randn(rank, into, generator=draw)},
        {"m": torch.randn(out, rank, generator=draw)},
    )


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-4, atol=1e-4)


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def dense_tsv(updates: Sequence[LowRankUpdate], weights: Sequence[float]) -> Tensor:
    """Algorithm 1 of arXiv 2412.00081 on dense ΔWᵢ, every one kept to its rank."""
    us, ss, vs = [], [], []
    for u, w in zip(updates, weights, strict=True):
        left, values, right = torch.linalg.svd(u.delta("m").double(), full_matrices=False)
        keep = u.rank("m")
        us.append(left[:, :keep])
        ss.append(w * values[:keep])
        vs.append(right[:keep])
    left, right = nearest_orthogonal(torch.cat(us, dim=1)), nearest_orthogonal(torch.cat(vs))
    return left @ torch.diag(torch.cat(ss)) @ right


def dense_iso(updates: Sequence[LowRankUpdate], weights: Sequence[float]) -> Tensor:
    """All nonzero singular values of the dense sum set to their mean (arXiv 2502.04959)."""
    total = sum(w * u.delta("m").double() for u, w in zip(updates, weights, strict=True))
    left, values, right = torch.linalg.svd(total, full_matrices=False)
    keep = sum(u.rank("m") for u in updates)
    return values[:keep].mean() * left[:, :keep] @ right[:keep]


@unhurried
@given(drawn_parts)
def test_core_space_loses_nothing(drawn: list[tuple[int, int, float]]) -> None:
    updates = [update(seed, rank) for seed, rank, _ in drawn]
    core = Core.of(updates, "m")
    assert core.columns.shape[1] <= sum(rank for _, rank, _ in drawn)
    for part, one in zip(core.parts, updates, strict=True):
        close(core.columns @ part @ core.rows, one.delta("m"))
        a, b = core.factors(part)
        close(b @ a, one.delta("m"))


@unhurried
@given(drawn_parts)
def test_tsv_is_the_dense_method(drawn: list[tuple[int, int, float]]) -> None:
    updates, weights = [update(seed, rank) for seed, rank, _ in drawn], [w for *_, w in drawn]
    merged = tsv(updates, weights)
    close(merged.delta("m"), dense_tsv(updates, weights))
    assert merged.rank("m") <= sum(rank for _, rank, _ in drawn)


@unhurried
@given(drawn_parts)
def test_iso_c_is_the_dense_method_on_what_the_adapters_span(
    drawn: list[tuple[int, int, float]],
) -> None:
    updates, weights = [update(seed, rank) for seed, rank, _ in drawn], [w for *_, w in drawn]
    merged = iso_c(updates, weights)
    close(merged.delta("m"), dense_iso(updates, weights))


@pytest.mark.parametrize("merge", [tsv, iso_c])
def test_adapters_that_fill_a_small_layer_or_are_equal_or_zero(merge: Callable) -> None:
    small = [update(seed, 4, out=6, into=5) for seed in range(3)]
    assert merge(small).delta("m").isfinite().all()
    one = update(0, 2)
    assert merge([one, one]).delta("m").isfinite().all()
    if merge is tsv:  # what adapters share counts once
        close(merge([one, one], [1.0, 1.0]).delta("m"), one.delta("m"))
    zero = LowRankUpdate({"m": torch.zeros(2, 13)}, {"m": torch.zeros(16, 2)})
    assert not merge([zero, zero]).delta("m").any()
    assert merge([one, zero], [1.0, 0.0]).delta("m").isfinite().all()


def test_a_weak_adapter_is_not_rounded_away() -> None:
    one, other = update(0, 2), update(1, 2)
    weak = LowRankUpdate(other.a, {"m": other.b["m"] * 1e-5})
    close(1e5 * (tsv([one, weak], [0.0, 1.0]).delta("m")), dense_tsv([one, other], [0.0, 1.0]))


def test_modules_of_one_adapter_alone_keep_its_update() -> None:
    one, other = update(0, 2), update(1, 3)
    only = LowRankUpdate({"n": other.a["m"]}, {"n": other.b["m"]})
    merged = tsv([one, only], [1.0, 0.5])
    close(merged.delta("m"), one.delta("m"))
    close(merged.delta("n"), 0.5 * other.delta("m"))


def test_dare_that_drops_nothing_is_the_sum_from_the_factors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    updates = [update(0, 2), update(1, 3)]
    wanted = exact(updates, [1.0, 0.5]).delta("m"), svd(updates, [1.0, 0.5], rank=2).delta("m")
    monkeypatch.setattr(LowRankUpdate, "delta", lambda *_: pytest.fail("dense"))
    whole, cut = dare(updates, [1.0, 0.5], density=1.0), dare(updates, [1.0, 0.5], 1.0, rank=2)
    close(whole.b["m"] @ whole.a["m"], wanted[0])
    close(cut.b["m"] @ cut.a["m"], wanted[1])
