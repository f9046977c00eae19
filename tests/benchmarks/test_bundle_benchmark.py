"""The bundle benchmark at tiny scale: what it makes, what that costs, and that both ways agree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.bundles.__main__ import run
from benchmarks.bundles.adapters import ADAPTERS, COMPOSITIONS, linear_shapes, needed
from benchmarks.bundles.exporting import ARTIFACTS, RUNS
from benchmarks.bundles.inputs import Factors
from benchmarks.bundles.records import Results
from benchmarks.bundles.tables import added, render, whole
from benchmarks.export.checkpoint import SHAPES, tensor_shapes, write_checkpoint
from caliport.calibrate.peft_files import read_peft
from caliport.core.checkpoints import load_config
from caliport.core.directories import read_manifest
from caliport.export.decoder.skeleton import empty
from caliport.export.decoder.terms import split

pytestmark = pytest.mark.benchmark
NAMES = list(COMPOSITIONS)[:2]
RANK = 4  # of LC++


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundles")
    write_checkpoint(SHAPES["tiny"], root / "base")
    (root / "results.md").write_text("<!-- bundles: tables -->\n<!-- bundles: end -->\n")
    run(
        out=root / "out",
        checkpoint=root / "base",
        scale="tiny",
        compositions=len(NAMES),
        used=2,
        threads=1,
        context=128,
        prompt=24,
        new_tokens=4,
        rounds=1,
        results=root / "results.md",
    )
    return root


@pytest.fixture(scope="module")
def results(place: Path) -> Results:
    return Results.model_validate_json((place / "out" / "results.json").read_text())


@pytest.fixture(scope="module")
def shapes(place: Path) -> dict[str, tuple[int, int]]:
    return linear_shapes(empty(load_config(place / "base")[0]))


def test_the_paper_has_fourteen_compositions() -> None:
    assert len(COMPOSITIONS) == 14
    assert needed(list(COMPOSITIONS)) == list(ADAPTERS)
    assert needed(["reply_de"]) == ["reply", "de"]


def test_adapters_have_the_papers_form(place: Path, shapes: dict[str, tuple[int, int]]) -> None:
    made = place / "out" / "made"
    adapters = {n: read_peft(made / "adapters" / n) for n in needed(NAMES)}
    for name in NAMES:
        merged = split(read_peft(made / "merged" / name), adapters)
        assert set(merged.adapters) == set(COMPOSITIONS[name])
        assert merged.weight == pytest.approx(0.5)
        alone = read_peft(made / "alone" / name)
        assert {alone.rank(module) for module in alone.modules} == {RANK}
        assert set(alone.modules) == set(shapes)
        layers = [alone.delta(f"model.layers.{i}.mlp.up_proj") for i in (0, 1)]
        assert layers[0].abs().max() > 0
        assert torch.equal(*layers), "one correction for all layers"


def test_sizes_are_those_of_the_matrices(
    results: Results, place: Path, shapes: dict[str, tuple[int, int]]
) -> None:
    layers = SHAPES["tiny"].layers
    own = len(NAMES) * 2 * RANK * sum(out + into for out, into in shapes.values()) // layers
    rows = sum(32 * (out + into) + 4 * (out + 32) for out, into in shapes.values())
    merged, alone = results.parts["merged-methods"], results.parts["alone-methods"]
    assert merged["own"] == alone["own"] == own
    assert merged["adapters"] == len(needed(NAMES)) * rows
    assert alone["adapters"] == 0
    for name in ARTIFACTS:
        parts = results.parts[name]
        assert parts["total"] == sum(size for part, size in parts.items() if part != "total")
    lowering = read_manifest(place / "out" / "merged-methods")["lowering"]
    assert lowering["methods"] == ["forward", *NAMES]


def test_fourteen_compositions_of_a_billion_parameters_keep_the_targets(results: Results) -> None:
    """A method's program grows with layers, not with their width; so the tiny one tells."""
    tiny, large = SHAPES["tiny"], SHAPES["1b"]
    matrices = [s for n, s in tensor_shapes(large) if len(s) == 2]
    folded = sum(rows * width * 4.5 / 8 for rows, width in matrices)
    per_layer = [rows + width for rows, width in matrices[1:]]
    own = 2 * RANK * sum(per_layer) / large.layers
    cost = {}
    for family in ("merged", "alone"):
        program = results.parts[f"{family}-methods"]["programs"] / len(NAMES)
        cost[family] = 14 * (own + program * large.layers / tiny.layers) / folded
    assert cost["merged"] < 0.02
    assert 1 + cost["alone"] < 1.03
    assert added(results, "merged-methods") > cost["merged"], "a tiny base makes them look large"
    assert whole(results, "alone-methods") > 1


def test_both_ways_compute_the_same(results: Results) -> None:
    """But for activations that round the other way to 8 bits, which moves logits by a step."""
    for family, found in results.parity.items():
        assert found.difference < 0.03, family
        assert found.cosine > 0.999, family


def test_inputs_are_the_compositions(place: Path) -> None:
    factors = Factors(place / "out" / "merged-inputs")
    for name in NAMES[:2]:
        update = read_peft(place / "out" / "made" / "merged" / name)
        inputs = zip(factors.inputs, factors.of(name), strict=True)
        terms = {place: term[0] for place, term in inputs}
        assert len(terms) == 2 * len(update.modules)
        for module in update.modules:
            delta = terms[f"{module}.B"] @ terms[f"{module}.A"]
            error = (delta - update.delta(module)).norm() / update.delta(module).norm()
            assert error < 0.02, "adapters have 8 bits"


def test_everything_has_run(results: Results) -> None:
    for ways in results.ways.values():
        assert tuple(ways) == RUNS
        for name, way in ways.items():
            turns = 1 if name == "folded" else 2
            assert len(way.prefill) == len(way.decode) == len(way.warm) == turns
            assert len(way.cold) == len(way.more) == turns - 1
            assert min([*way.load, *way.prefill, *way.decode, *way.cold, *way.warm]) > 0
            assert way.memory > 0
            assert len(way.load) == 3


def test_packed_weights_are_shared(place: Path) -> None:
    """In a process of its own: what XNNPACK is told holds for all programs loaded later."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.bundles.speed import Held\n"
        "held = Held(sys.argv[2], Path(sys.argv[1]), 1, 'forward')\n"
        "print(*(held.forward(m, [5, 6, 7], 0).double().sum().item() for m in sys.argv[3:]))"
    )
    said = {}
    for way in ("methods", "cached"):
        command = [sys.executable, "-c", code, str(place / "out" / "merged-methods"), way, *NAMES]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        said[way] = [float(number) for number in done.stdout.split()[-len(NAMES) :]]
    assert said["methods"] == said["cached"]
    assert len(set(said["methods"])) == len(NAMES)


def test_tables_name_every_artifact(results: Results, place: Path) -> None:
    text = (place / "results.md").read_text()
    assert render(results) in text
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()]
    for family in ("LC++", "corrections alone"):
        assert rows.count(family) == 1
        assert rows.count(f"{family}, methods") == rows.count(f"{family}, inputs") == 1
    assert rows.count("methods, packed weights shared") == 2
    assert f"{whole(results, 'alone-methods'):.3f}" in text
