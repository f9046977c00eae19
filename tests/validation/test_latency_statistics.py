from __future__ import annotations

from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from caliport.validation.latency.bandwidth import bandwidth_share, token_bytes
from caliport.validation.latency.statistics import (
    LEVEL,
    artifact_noise,
    machine_noise,
    median_interval,
    ratio,
    spread,
)
from caliport.validation.latency.workload import Workload
from caliport.validation.records.latency import LatencyResult
from tests.validation import examples

TIMES = st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=40)


@pytest.mark.parametrize("count", [2, 5, 6, 9, 30])
def test_the_interval_covers_the_median_as_often_as_it_says(count: int) -> None:
    draws = np.random.default_rng(0).lognormal(0.0, 1.5, (20_000, count))  # its median is 1
    found = [median_interval(row.tolist()) for row in draws]
    level = found[0][2]
    share = np.mean([low <= 1 <= high for low, high, _ in found])
    assert abs(share - level) < 4 * (0.25 / len(draws)) ** 0.5
    assert (level >= LEVEL) is (count >= 6)


@given(TIMES)
def test_the_interval_is_the_narrowest_that_reaches_the_level(values: list[float]) -> None:
    ordered, count = sorted(values), len(values)
    below = max(1, int(binom.ppf((1 - LEVEL) / 2, count, 0.5)))
    level = 1 - 2 * binom.cdf(below - 1, count, 0.5)
    wanted = (ordered[below - 1], ordered[-below], pytest.approx(level))
    assert median_interval(values) == wanted
    assert wanted[0] <= median(values) <= wanted[1]


@given(TIMES)
def test_noise_does_not_depend_on_the_unit(values: list[float]) -> None:
    times = spread(values)
    steady = spread([values[0]] * len(values))
    assert machine_noise(steady) is None
    assert (artifact_noise(steady, steady) is None) is (len(values) > 1)
    if artifact_noise(times, steady) is None:
        assert times.interval[1] - times.interval[0] <= 0.2 * times.median
    scaled = spread([2.0**4 * value for value in values])
    assert (machine_noise(scaled) is None) == (machine_noise(times) is None)
    assert (artifact_noise(scaled, scaled) is None) == (artifact_noise(times, times) is None)


def test_one_outlier_is_no_noise_and_a_busy_half_is() -> None:
    assert machine_noise(spread([1.0] * 30 + [9.0])) is None
    found = machine_noise(spread([1.0] * 20 + [1.3] * 20))
    assert found == (
        "half of the times of the same work lie between 1e+03 and 1.3e+03 ms, expected within 10% "
        "of their median"
    )
    assert artifact_noise(spread([1.0] * 30 + [9.0]), spread([1.0] * 31)) is None
    found = artifact_noise(spread([1.0] * 6), spread([1.0] * 3 + [1.5] * 3))
    assert found == ("decode rate: the median's interval is 40% of it wide, expected 20% at most")


def result(rates: list[float], noise: str | None = None) -> LatencyResult:
    update = {"decode_rate": spread(rates), "noise": noise}
    return examples.latency().artifacts[0].model_copy(update=update)


def test_ratios_are_taken_within_rounds_and_not_of_noise() -> None:
    slowing = result([8.0, 6.0, 4.0, 2.0])
    twice = ratio(result([16.0, 12.0, 8.0, 4.0]), slowing, "decode_rate")
    assert twice is not None
    assert (twice.median, twice.interval) == (2.0, (2.0, 2.0))
    assert ratio(slowing, result([1.0] * 4, "uneasy"), "decode_rate") is None


def test_every_round_has_an_order_of_its_own_from_the_seed() -> None:
    rounds = Workload(2, 12, seed=1).orders(5)
    assert all(sorted(order) == list(range(5)) for order in rounds)
    assert len({tuple(order) for order in rounds}) > 6
    assert rounds == Workload(2, 12, seed=1).orders(5) != Workload(2, 12, seed=2).orders(5)
    assert Workload(2, 3, seed=1).orders(5) == rounds[:3]


def sizes(**parts: int) -> dict[str, int]:
    found = {"linear": 9000, "head": 0, "embedding": 0, "scales": 0, "other": 50} | parts
    return {**found, "total": sum(found.values())}


@pytest.mark.parametrize(
    ("parts", "cache_bits", "read"),
    [
        ({"embedding": 6400}, None, 9000 + 6400 + 50),  # tied: the head reads the table
        ({"head": 25600, "embedding": 25600}, None, 9000 + 25600 + 50),
        ({"head": 6400, "embedding": 6400, "scales": 400 + 400 + 7}, None, 9000 + 6400 + 407 + 50),
        ({"head": 3200, "embedding": 3200, "scales": 400 + 400 + 7}, 8, 9000 + 3200 + 407 + 50),
    ],
)
def test_bytes_of_a_token_are_all_but_a_table_looked_up(
    parts: dict[str, int], cache_bits: int | None, read: int
) -> None:
    base = {"vocab_size": 100, "hidden_size": 64, "cache_values": 32}
    manifest = {"sizes": sizes(**parts), "base": base, "quantization": {"cache_bits": cache_bits}}
    assert token_bytes(manifest, 0) == read
    assert token_bytes(manifest, 10.5) == read + 10.5 * 32 * (4 if cache_bits is None else 1)
    assert token_bytes({"base": base}, 10) is None


def test_share_of_bandwidth_is_for_what_does_not_fit_the_cache() -> None:
    assert bandwidth_share(800_000_000, 50.0, 80.0, 32_000_000) == pytest.approx(0.5)
    assert bandwidth_share(800_000_000, 50.0, 80.0, None) == pytest.approx(0.5)
    assert bandwidth_share(32_000_000, 50.0, 80.0, 32_000_000) is None
    assert bandwidth_share(None, 50.0, 80.0, 32_000_000) is None
