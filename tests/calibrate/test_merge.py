"""Merges against the equations written out densely, over any shapes and ranks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from caliport.calibrate import LowRankUpdate
from caliport.calibrate.bases import check_same_base
from caliport.calibrate.merges.common import rank_zero
from caliport.calibrate.merges.dare import dare
from caliport.calibrate.merges.exact import exact
from caliport.calibrate.merges.linear import linear
from caliport.calibrate.merges.registry import MERGES
from caliport.calibrate.merges.slerp import slerp
from caliport.calibrate.merges.svd import svd
from caliport.calibrate.merges.ties import ties
from caliport.core.errors import InputError

OUT, INTO = 7, 5
FULL = min(OUT, INTO)


def update(
    seed: int,
    rank: int,
    modules: tuple[str, ...] = ("x.q", "x.v"),
    shape: tuple[int, int] = (OUT, INTO),
) -> LowRankUpdate:
    draw = torch.Generator().manual_seed(seed)
    return LowRankUpdate(
        {n: torch.randn(rank, shape[1], generator=draw) for n in modules},
        {n: torch.randn(shape[0], rank, generator=draw) for n in modules},
    )


unhurried = settings(max_examples=50, deadline=None)


def weight_of(least: float) -> st.SearchStrategy[float]:
    return st.floats(least, 2).map(lambda weight: round(weight, 3))


shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
parts = st.lists(
    st.tuples(st.integers(0, 99), st.integers(1, 6), weight_of(-2)), min_size=1, max_size=4
)
positive = st.lists(
    st.tuples(st.integers(0, 99), st.integers(1, 6), weight_of(0.1)), min_size=1, max_size=4
)


def given_parts(
    drawn: list[tuple[int, int, float]], shape: tuple[int, int] = (OUT, INTO)
) -> tuple[list[LowRankUpdate], list[float]]:
    return [update(seed, rank, shape=shape) for seed, rank, _ in drawn], [w for _, _, w in drawn]


def weighted_sum(updates: list[LowRankUpdate], weights: list[float], name: str) -> Tensor:
    total = torch.zeros(updates[0].shape(name))
    for u, w in zip(updates, weights, strict=True):
        total += w * u.delta(name)
    return total


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def truncated(dense: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(dense.double(), full_matrices=False)
    return (u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]).float()


@unhurried
@given(st.lists(st.integers(0, 99), min_size=1, max_size=4), st.integers(1, 6))
def test_linear_is_equation_5(seeds: list[int], rank: int) -> None:
    updates = [update(seed, rank) for seed in seeds]
    merged = linear(updates)
    for name in merged.modules:
        b = torch.zeros(OUT, rank)
        a = torch.zeros(rank, INTO)
        for u in updates:
            b += u.b[name] / len(updates)
            a += u.a[name] / len(updates)
        torch.testing.assert_close(merged.delta(name), b @ a, rtol=1e-4, atol=1e-5)


@unhurried
@given(parts, shapes)
def test_exact_is_the_weighted_sum(
    drawn: list[tuple[int, int, float]], shape: tuple[int, int]
) -> None:
    updates, weights = given_parts(drawn, shape)
    merged = exact(updates, weights)
    for name in merged.modules:
        close(merged.delta(name), weighted_sum(updates, weights, name))
        assert merged.rank(name) == sum(rank for _, rank, _ in drawn)


@unhurried
@given(parts, shapes, st.integers(1, 12) | st.none())
def test_svd_is_the_best_approximation(
    drawn: list[tuple[int, int, float]], shape: tuple[int, int], rank: int | None
) -> None:
    """Eckart–Young: the error is the norm of the singular values left out."""
    updates, weights = given_parts(drawn, shape)
    merged = svd(updates, weights, rank=rank)
    most = rank or max(r for _, r, _ in drawn)
    for name in merged.modules:
        wanted = weighted_sum(updates, weights, name)
        values = torch.linalg.svdvals(wanted.double())
        assert merged.rank(name) <= most
        error = (merged.delta(name) - wanted).norm()
        scale = 1 + float(values.norm())
        assert abs(float(error) - float(values[most:].norm())) <= 1e-5 * scale
        # A and B share the singular values' roots.
        torch.testing.assert_close(
            merged.a[name].norm(dim=1), merged.b[name].norm(dim=0), rtol=1e-3, atol=1e-3
        )


def test_svd_of_all_ranks_is_exact() -> None:
    updates = [update(0, 2), update(1, 3)]
    for rank in (5, 9):
        close(svd(updates, rank=rank).delta("x.q"), exact(updates).delta("x.q"))


def naive_ties(deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    """Value by value, from the paper's three steps."""
    trimmed = []
    for delta in deltas:
        keep = max(1, int(density * delta.numel()))
        least = sorted(delta.flatten().abs().tolist(), reverse=True)[keep - 1]
        trimmed.append([v if abs(v) >= least else 0.0 for v in delta.flatten().tolist()])
    merged = []
    for values in zip(*trimmed, strict=True):
        terms = [w * v for w, v in zip(weights, values, strict=True)]
        positive = sum(terms) >= 0
        agree = [i for i, t in enumerate(terms) if (t > 0 if positive else t < 0)]
        mean = sum(terms[i] for i in agree) / sum(abs(weights[i]) for i in agree) if agree else 0.0
        merged.append(mean * sum(map(abs, weights)))
    return torch.tensor(merged).view_as(deltas[0])


@unhurried
@given(parts, shapes, st.sampled_from([0.01, 0.2, 0.5, 0.77, 1.0]))
def test_ties_is_the_papers_loop(
    drawn: list[tuple[int, int, float]], shape: tuple[int, int], density: float
) -> None:
    updates, weights = given_parts(drawn, shape)
    merged = ties(updates, weights, density=density, rank=min(shape))
    default = ties(updates, weights, density=density)
    for name in merged.modules:
        wanted = naive_ties([u.delta(name) for u in updates], weights, density)
        close(merged.delta(name), wanted)
        most = min(*shape, sum(r for _, r, _ in drawn))
        assert default.rank(name) == most
        error, least = (default.delta(name) - wanted).norm(), truncated(wanted, most) - wanted
        assert float(error) <= float(least.norm()) + 1e-3


def test_ties_has_the_papers_scale() -> None:
    """Weights 1/N: the mean over those that agree; where all agree, the exact sum."""

    def single(values: list[float]) -> LowRankUpdate:
        return LowRankUpdate({"m": torch.ones(1, 1)}, {"m": torch.tensor(values)[:, None]})

    updates = [single([3.0, 1.0, 2.0]), single([1.0, -3.0, 4.0])]
    merged = ties(updates, density=1.0)
    close(merged.delta("m").flatten(), torch.tensor([2.0, -3.0, 3.0]))
    assert torch.equal(
        ties(updates[:1], density=0.4).delta("m").flatten() != 0, torch.tensor([1, 0, 0]) > 0
    )
    both = ties([updates[0], updates[0]], [0.7, 0.2], density=1.0)
    close(both.delta("m"), 0.9 * updates[0].delta("m"))


@unhurried
@given(parts, shapes, st.sampled_from([0.2, 0.5, 1.0]), st.integers(0, 2**31))
def test_dare_keeps_or_drops(
    drawn: list[tuple[int, int, float]], shape: tuple[int, int], density: float, seed: int
) -> None:
    """Every value of the merge is a sum over some subset of the adapters, each over density."""
    updates, weights = given_parts(drawn, shape)
    merged = dare(updates, weights, density=density, seed=seed, rank=min(shape))
    again = dare(updates, weights, density=density, seed=seed, rank=min(shape))
    for name in merged.modules:
        assert torch.equal(merged.a[name], again.a[name])
        assert torch.equal(merged.b[name], again.b[name])
        terms = [w * u.delta(name) / density for u, w in zip(updates, weights, strict=True)]
        sums = [torch.zeros(shape)]
        for term in terms:
            sums = sums + [s + term for s in sums]
        wanted = sums[-1:] if density == 1 else sums
        distance = torch.stack([(merged.delta(name) - s).abs() for s in wanted]).amin(dim=0)
        assert distance.max() <= 1e-3


def test_dare_expects_the_exact_sum() -> None:
    updates = [update(0, 2, ("m",)), update(1, 3, ("m",))]
    wanted = exact(updates).delta("m")
    draws = [dare(updates, density=0.5, seed=seed, rank=FULL).delta("m") for seed in range(600)]
    assert not torch.equal(draws[0], draws[1])
    # A value's variance is Σ (wᵢΔWᵢ)²·(1 − density)/density; five standard errors of the mean.
    deviation = torch.stack([0.25 * u.delta("m") ** 2 for u in updates]).sum(dim=0).sqrt()
    bound = 5 * deviation / math.sqrt(len(draws)) + 1e-3
    assert ((torch.stack(draws).mean(dim=0) - wanted).abs() <= bound).all()


def naive_slerp(one: Tensor, two: Tensor, t: float) -> Tensor:
    if not one.any() or not two.any():
        return (1 - t) * one + t * two
    cosine = float((one * two).sum() / (one.norm() * two.norm()))
    if abs(cosine) > 0.9995:
        return (1 - t) * one + t * two
    angle = math.acos(cosine)
    first, second = math.sin((1 - t) * angle), math.sin(t * angle)
    return (first * one + second * two) / math.sin(angle)


@unhurried
@given(positive, shapes)
def test_slerp_is_the_dense_formula(
    drawn: list[tuple[int, int, float]], shape: tuple[int, int]
) -> None:
    updates, weights = given_parts(drawn, shape)
    merged = slerp(updates, weights)
    for name in merged.modules:
        wanted, done = updates[0].delta(name).double(), weights[0]
        cosines = []
        for u, w in zip(updates[1:], weights[1:], strict=True):
            done += w
            delta = u.delta(name).double()
            cosines.append(torch.cosine_similarity(wanted.flatten(), delta.flatten(), dim=0))
            wanted = naive_slerp(wanted, delta, w / done)
        assert merged.rank(name) == sum(r for _, r, _ in drawn)
        # On the brink of the fallback float32 and float64 may decide differently.
        if all(abs(abs(float(c)) - 0.9995) > 1e-4 for c in cosines):
            torch.testing.assert_close(
                merged.delta(name), wanted.float(), rtol=1e-3, atol=1e-3 * float(wanted.abs().max())
            )


def test_slerp_keeps_the_norm_and_halves_the_angle() -> None:
    one, two = update(0, 2, ("m",)), update(1, 3, ("m",))
    two = LowRankUpdate(two.a, {"m": two.b["m"] * one.delta("m").norm() / two.delta("m").norm()})
    cosine = torch.cosine_similarity(one.delta("m").flatten(), two.delta("m").flatten(), dim=0)
    merged = slerp([one, two]).delta("m")
    torch.testing.assert_close(merged.norm(), one.delta("m").norm())
    for side in (one, two):
        half = torch.cosine_similarity(merged.flatten(), side.delta("m").flatten(), dim=0)
        torch.testing.assert_close(half.acos(), cosine.acos() / 2, rtol=1e-4, atol=1e-4)
    close(slerp([one, one]).delta("m"), one.delta("m"))
    close(slerp([one, two], [1.0, 0.0]).delta("m"), one.delta("m"))


@pytest.mark.parametrize(
    "merge",
    [
        exact,
        slerp,
        lambda u: svd(u, rank=FULL),
        lambda u: ties(u, density=1.0),
        lambda u: dare(u, density=1.0),
    ],
    ids=["exact", "slerp", "svd", "ties", "dare"],
)
def test_a_module_of_one_keeps_what_that_gives(merge: Callable) -> None:
    one, other = update(0, 2, ("x.q",)), update(1, 3, ("x.q", "x.v"))
    merged = merge([one, other])
    assert merged.modules == ("x.q", "x.v")
    close(merged.delta("x.v"), other.delta("x.v") / 2)
    if merge is exact:
        close(merged.delta("x.q"), (one.delta("x.q") + other.delta("x.q")) / 2)


@pytest.mark.parametrize("name", MERGES)
def test_merges_are_functions_of_updates_they_leave_alone(name: str) -> None:
    updates = [update(seed, 2) for seed in range(3)]
    before = [(u.a["x.q"].clone(), u.b["x.q"].clone()) for u in updates]
    merged = MERGES[name](updates, [0.5, 0.3, 0.2])
    for u, (a, b) in zip(updates, before, strict=True):
        assert torch.equal(u.a["x.q"], a)
        assert torch.equal(u.b["x.q"], b)
    assert merged.modules == ("x.q", "x.v")
    assert merged.delta("x.q").dtype == torch.float32
    again = MERGES[name](updates, [0.5, 0.3, 0.2])
    assert torch.equal(merged.delta("x.q"), again.delta("x.q"))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), shapes)
def test_a_single_adapter_is_its_own_merge(rank: int, shape: tuple[int, int]) -> None:
    """But for those that drop values."""
    one = update(0, rank, shape=shape)
    for name in ("linear", "exact", "svd", "slerp", "tsv"):
        close(MERGES[name]([one]).delta("x.q"), one.delta("x.q"))


def test_rank_zero_is_no_adapter() -> None:
    merged = rank_zero([update(0, 2, ("x.q",)), update(1, 3, ("x.v",))])
    assert merged.modules == ("x.q", "x.v")
    for name in merged.modules:
        assert merged.rank(name) == 0
        assert merged.shape(name) == (OUT, INTO)
        assert torch.equal(merged.delta(name), torch.zeros(OUT, INTO))


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


@pytest.mark.parametrize("name", MERGES)
def test_every_merge_checks_its_input(name: str) -> None:
    odd = [update(0, 2, ("x.v",)), update(1, 2), update(2, 2, ("x.q",), shape=(6, 5))]
    merge = MERGES[name]
    if name != "linear":
        with pytest.raises(
            InputError, match=r"x.q: adapter 2 has shape \(7, 5\), adapter 3 \(6, 5\)"
        ):
            merge(odd)
    with pytest.raises(InputError, match="at least one adapter"):
        merge([])
    with pytest.raises(InputError, match="3 weights for 2 adapters"):
        merge([update(0, 2), update(1, 2)], [1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="weight 2 is nan, expected a finite number"):
        merge([update(0, 2), update(1, 2)], [1.0, float("nan")])


@pytest.mark.parametrize(
    ("merge", "setting", "says"),
    [
        (svd, {"rank": 0}, "rank is 0, expected 1 or more"),
        (ties, {"rank": -1}, "rank is -1, expected 1 or more"),
        (ties, {"density": 0.0}, "density is 0.0, expected more than 0 and at most 1"),
        (dare, {"density": 1.5}, "density is 1.5, expected more than 0 and at most 1"),
        (dare, {"density": float("nan")}, "density is nan"),
        (slerp, {"weights": [1.0, -0.5]}, "none negative"),
        (slerp, {"weights": [0.0, 0.0]}, "not all 0"),
    ],
)
def test_settings_out_of_range(merge: Callable, setting: dict, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        merge([update(0, 2), update(1, 2)], **setting)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("bases", "fits"),
    [
        (["hub/Base", "/models/base/", "C:\\models\\BASE"], True),
        (["hub/base", None, "", "other/base"], True),
        (["hub/base", "/cache/models--hub--base/snapshots/0a1b2c"], True),
        ([("hub/base", "main"), ("hub/base", "v2"), "hub/base"], True),
        (["hub/base-1b", "hub/base-3b"], False),
        ([None, "hub/base", None, "hub/base-chat"], False),
        ([("hub/base", "v1"), ("hub/base", "v2")], False),
    ],
)
def test_adapters_of_one_base(bases: list, fits: bool, tmp_path: Path) -> None:
    directories = []
    for index, base in enumerate(bases):
        name, revision = base if isinstance(base, tuple) else (base, None)
        directories.append(tmp_path / f"adapter{index}")
        directories[-1].mkdir()
        config = {"peft_type": "LORA", "base_model_name_or_path": name, "revision": revision}
        (directories[-1] / "adapter_config.json").write_text(json.dumps(config))
    if fits:
        check_same_base(directories)
        return
    with pytest.raises(InputError, match="expected adapters of one base") as caught:
        check_same_base(directories)
    named = [d for d, b in zip(directories, bases, strict=True) if b]
    for directory, base in zip(named, [b for b in bases if b], strict=True):
        assert str(directory) in str(caught.value)
        for part in base if isinstance(base, tuple) else [base]:
            assert part in str(caught.value)
    assert "\n" not in str(caught.value)
