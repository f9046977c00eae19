"""The merge under a correction: which one, with which weights, over which layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import random_adapter
from forking import forked

import caliport
from caliport.calibrate import LowRankUpdate, read_peft
from caliport.calibrate.corrections.common import Composition
from caliport.calibrate.corrections.registry import CORRECTIONS
from caliport.calibrate.merges.exact import exact
from caliport.calibrate.merges.linear import linear
from caliport.calibrate.merges.registry import MERGES
from caliport.calibrate.merges.weights import search_weights
from caliport.core.directories import read_manifest
from caliport.core.errors import InputError

STILL = {"steps": 1, "batch_size": 2, "learning_rate": 1e-12}
"""A training that leaves a correction where it begins."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"input": f"Anna {i}", "output": f"Tom {i}"} for i in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.fixture(scope="module")
def unlike(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters as a hub has them: ranks 4 and 2, and other modules."""
    root = tmp_path_factory.mktemp("unlike")
    return [
        random_adapter(base_dir, root / "one", seed=1, rank=4, target_modules=["q_proj", "v_proj"]),
        random_adapter(base_dir, root / "two", seed=2, rank=2, target_modules=["q_proj", "o_proj"]),
    ]


def composed(base: Path, adapters: list[Path], out: Path, **how: object) -> LowRankUpdate:
    caliport.compose(base, adapters, out, training=STILL, **how)
    return read_peft(out)


def assert_equal(found: LowRankUpdate, wanted: LowRankUpdate) -> None:
    assert set(wanted.modules) <= set(found.modules)
    for name in wanted.modules:
        torch.testing.assert_close(found.delta(name), wanted.delta(name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lc", "lc++", "lc++-per-layer", "scales", "cat"])
def test_weights_reach_every_correction(
    method: str, base_dir: Path, adapter_dirs: list[Path], data: Path, tmp_path: Path
) -> None:
    """Untrained, a correction is the merge under it."""
    updates = [read_peft(path) for path in adapter_dirs]
    merges = CORRECTIONS[method.removesuffix("-per-layer")].merges
    how = {"merge": "exact"} if merges else {}
    found = composed(
        base_dir, adapter_dirs, tmp_path / "a", method=method, data=data, weights=[1, 0.25], **how
    )
    assert_equal(found, exact(updates, [1.0, 0.25]))
    if method == "lc++":
        again = tmp_path / "b"
        found = composed(base_dir, adapter_dirs, again, method=method, data=data, weights=[2, 1])
        assert_equal(found, linear(updates, [2.0, 1.0]))
        caliport.compose(
            base_dir, adapter_dirs, tmp_path / "c", method=method, data=data, training=STILL
        )
        settings = read_manifest(tmp_path / "c")["settings"]
        assert not {"one weights", "search", "target_modules", "weights"} & set(settings)


@pytest.mark.parametrize("merge", ["svd", "tsv", "iso-c", "slerp", "dare"])
def test_every_merge_under_a_correction(
    merge: str, base_dir: Path, unlike: list[Path], data: Path, tmp_path: Path
) -> None:
    found = composed(
        base_dir, unlike, tmp_path / "a", method="lc", data=data, merge=merge, weights=[1, 0.5]
    )
    assert_equal(found, MERGES[merge]([read_peft(path) for path in unlike], [1.0, 0.5]))


@pytest.mark.parametrize("method", ["lc", "lc++-int4", "scales", "cat"])
def test_adapters_of_other_ranks_and_modules_compose(
    method: str, base_dir: Path, unlike: list[Path], data: Path, tmp_path: Path
) -> None:
    """As two from a hub do, with no flag: on the exact sum instead of the linear merge."""
    found = composed(base_dir, unlike, tmp_path / "a", method=method, data=data)
    assert_equal(found, exact([read_peft(path) for path in unlike]))
    said = read_manifest(tmp_path / "a").get("merge")
    assert said == ("exact" if method.startswith("lc") else None)
    with pytest.raises(InputError, match="linear merge"):
        composed(base_dir, unlike, tmp_path / "b", method="lc", data=data, merge="linear")


@pytest.mark.parametrize("method", ["lc", "lc++", "lc++-alone", "lc++-int4"])
def test_a_correction_reaches_layers_that_the_adapters_leave_alone(
    method: str, base_dir: Path, unlike: list[Path], data: Path, tmp_path: Path
) -> None:
    training = {"steps": 3, "batch_size": 2, "learning_rate": 1e-2}
    caliport.compose(
        base_dir, unlike, tmp_path / "a", method=method, data=data, training=training,
        target_modules=["down_proj"],
    )  # fmt: skip
    found = read_peft(tmp_path / "a")
    below = {m for path in unlike for m in read_peft(path).modules}
    reached = set(found.modules) - below
    assert {name.rpartition(".")[2] for name in reached} == {"down_proj"}
    assert len(reached) == 2, "in both layers"
    assert all(found.rank(name) == (1 if method == "lc" else 4) for name in reached)
    assert all(found.delta(name).any() for name in reached)


@pytest.mark.parametrize("method", ["exact", "lc++", "cat"])
def test_weights_are_searched_on_held_out_examples(
    method: str, base_dir: Path, adapter_dirs: list[Path], data: Path, tmp_path: Path
) -> None:
    found = composed(
        base_dir, adapter_dirs, tmp_path / "a", method=method, data=data, weights="search"
    )
    manifest = read_manifest(tmp_path / "a")
    tried = manifest["searched"]["one"]["tried"]
    assert [one["weights"] for one in tried] == [[0.5, 0.5], [0.5, 1.0], [1.0, 0.5], [1.0, 1.0]]
    best = min(tried, key=lambda one: one["loss"])
    assert manifest["weights"] == best["weights"]
    assert len({round(one["loss"], 6) for one in tried}) > 1
    merge = linear if method == "lc++" else exact
    assert_equal(found, merge([read_peft(path) for path in adapter_dirs], best["weights"]))
    assert manifest["settings"]["one data"][2] == 2, "a fifth of twelve, held out of training"


def test_a_search_tries_a_small_grid_and_1_over_n() -> None:
    wanted = (0.5, 1.0, 1.0)
    weights, tried = search_weights(
        3, lambda w: sum((x - y) ** 2 for x, y in zip(w, wanted, strict=True))
    )
    assert weights == wanted
    assert len(tried) == 9
    assert tried[0].weights == (1 / 3,) * 3
    assert search_weights(2, lambda w: float("nan") if w == (0.5, 0.5) else 1.0)[0] == (0.5, 1.0)
    with pytest.raises(InputError, match="no merge has a finite loss"):
        search_weights(2, lambda w: float("inf"))
    with pytest.raises(InputError, match="found 7 adapters, expected at most 6"):
        search_weights(7, lambda w: 1.0)


def test_scales_begin_at_the_weights(adapter_dirs: list[Path]) -> None:
    updates = {str(i): read_peft(path) for i, path in enumerate(adapter_dirs)}
    composition = Composition(updates, exact(list(updates.values())), (0.25, 2.0))
    for method in ("scales", "cat"):
        values = CORRECTIONS[method]({"c": composition}).m
        assert {key.split()[0]: float(m.flatten()[0]) for key, m in values.items()} == {
            "0": 0.25,
            "1": 2.0,
        }
    assert all(m.shape == (1,) for m in values.values())


ARGUMENTS = ("calibrate", "--base", "BASE", "--adapter", "ONE", "--adapter", "TWO", "--out", "out")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--method", "lc", "--merge", "best"], "--merge 'best': expected one of dare, exact"),
        (["--method", "exact", "--merge", "svd"], "exact has no merge under a correction"),
        (["--method", "lc-alone", "--merge", "svd"], "lc-alone has no merge under a correction"),
        (["--method", "cat", "--merge", "svd"], "cat has no merge under a correction"),
        (["--method", "lc", "--weight", "1"], "found 1 --weight for 2 --adapter"),
        (["--method", "lc", "--weight", "much"], "--weight 'much': expected a number, or search"),
        (["--method", "lc-alone", "--weight", "search"], "--weight: lc-alone has no merge"),
        (["--method", "lorahub", "--weight", "search"], "--weight: lorahub finds its own"),
        (["--method", "exact", "--weight", "search"], "--weight search needs --data"),
        (["--weight", "search", "--weight", "1"], "expected no other --weight beside it"),
        (["--method", "lc", "--weight", "search", "--data", "FEW"], "4 examples; --weight search"),
        (["--method", "cat", "--target", "o_proj"], "--target goes with a correction such as lc++"),
        (["--method", "lc", "--target", "no_proj", "--data", "DATA"], "is called 'no_proj'"),
        (["--method", "dare", "--density", "2"], "density is 2.0, expected more than 0"),
        (["--method", "flix", "--merge", "svd"], "--merge goes with --adapter"),
    ],
)
def test_flags_that_do_not_fit(
    flags: list[str],
    says: str,
    base_dir: Path,
    adapter_dirs: list[Path],
    data: Path,
    tmp_path: Path,
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(data.read_text().split("\n")[:4]))
    places = {"BASE": base_dir, "ONE": adapter_dirs[0], "TWO": adapter_dirs[1]}
    places |= {"DATA": data, "FEW": few}
    done = forked(*(places.get(a, a) for a in (*ARGUMENTS, *flags)), cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in " ".join(done.stderr.split())
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_flags_of_a_steered_correction(
    base_dir: Path, adapter_dirs: list[Path], data: Path, tmp_path: Path
) -> None:
    places = {"BASE": base_dir, "ONE": adapter_dirs[0], "TWO": adapter_dirs[1]}
    flags = ("--method", "lc", "--merge", "exact", "--weight", "1", "--weight=-0.5", "--data", data)
    done = forked(
        *(places.get(a, a) for a in ARGUMENTS), *flags, "--steps", 1, "--learning-rate", 1e-12,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wanted = exact([read_peft(path) for path in adapter_dirs], [1.0, -0.5])
    assert_equal(read_peft(tmp_path / "out"), wanted)
