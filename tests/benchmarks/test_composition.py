"""The comparison of methods, from its sweep to its tables, on a tiny model and two seeds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.composition import __main__ as benchmark
from benchmarks.composition.plans import PLANS, Plan
from caliport.core.directories import read_manifest
from caliport.recipe.read import read_recipe
from caliport.recipe.schema import prompts_of

RECIPE = """
name: tiny
data: {source: pocket, train: 64, validation: 12}
base:
  shape: {vocab_size: 400, hidden_size: 64, intermediate_size: 160, layers: 2, context: 320}
  train: {steps: 4, batch_size: 8, learning_rate: 5.0e-3, prompt_loss: true}
adapters: {summarize: , translate_es: }
lora: {rank: 4, alpha: 8, train: {steps: 2, batch_size: 8, learning_rate: 5.0e-3}}
compositions: {summarize_es: [summarize, translate_es]}
calibration:
  tuning: 8
  lc: {steps: 2, batch_size: 8}
  lc++: {steps: 2, batch_size: 8}
  scales: {steps: 2, batch_size: 8}
  joint: {steps: 2, batch_size: 8}
flix:
  ranks: {summarize: 2, es: 2}
  features: {summarize: [summarize], translate_es: [es], summarize_es: [summarize, es]}
  train_on: [summarize, translate_es]
  train: {steps: 2, batch_size: 8}
evaluation: {examples: 4, max_new_tokens: 4, metric: chrf}
"""


@pytest.mark.slow
def test_from_sweep_to_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    trained = ("lc", "lc++", "scales-per-layer", "joint")
    plan = Plan(
        recipe=tmp_path / "tiny.yaml",
        sweep_on="summarize_es",
        rates=dict.fromkeys(trained, (1e-3, 5e-2)),
        seeds=(0, 1),
        core=("linear", *trained, "lc++-int4", "mixture", "flix"),
        others=("zero-shot",),
        merges=("exact",),
        more=("lc++-int4-bundle",),
        more_on=("summarize_es",),
        quantized={"int4": ["lc++", "lc++-int4"], "int4-bundle": ["lc++", "lc++-int4-bundle"]},
        groups={"es": ("summarize_es",)},
    )
    monkeypatch.setitem(PLANS, "tiny", plan)
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results.md"
    results.write_text("before\n<!-- tiny: tables -->\nstale\n<!-- tiny: end -->\nafter\n")
    benchmark.main("tiny", runs=tmp_path / "runs", results=results)

    text = results.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "stale" not in text
    rates = {
        method: read_manifest(tmp_path / "runs/tiny-sweep/composed/summarize_es" / method)
        for method in trained
    }
    for method, manifest in rates.items():
        best = min(manifest["sweep"], key=lambda tried: tried["loss"])
        assert f"**{best['learning_rate']:g}: {best['loss']:.3f}**" in text, method
    for seed in ("tiny", "tiny-1"):
        made = read_manifest(tmp_path / f"runs/{seed}/composed/summarize_es/lc")
        assert made["settings"]["train"]["learning_rate"] == rates["lc"]["learning_rate"]
    assert not (tmp_path / "runs/tiny-1/base").exists(), "later seeds take the first one's base"
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert "| linear merge (Eq. 5) | 0 % ± 0 % |" in text
    assert "| joint-expert LoRA | 100 % ± 0 % |" in text
    assert "±" not in rows["| exact merge"], "one seed has no spread"
    assert re.search(r"summarize_es \| never trained \|", text)
    assert "lc++-int4 in int4 | lc++ in fp32" in text


@pytest.mark.parametrize("name", PLANS)
def test_plans_fit_their_recipes(name: str) -> None:
    plan = PLANS[name]
    recipe = read_recipe(plan.recipe)
    assert plan.sweep_on in recipe.compositions
    assert {c for group in plan.groups.values() for c in group} == set(recipe.compositions)
    assert set(plan.more_on) <= set(recipe.compositions)
    assert set(recipe.compositions) <= set(prompts_of(recipe))
    assert len({len(rates) for rates in plan.rates.values()}) == 1, "a fair sweep"
