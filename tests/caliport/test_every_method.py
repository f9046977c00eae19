"""Every method of a recipe, with quantized scores, a sweep and FLix, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from caliport.calibrate import LowRankUpdate, read_peft
from caliport.core.directories import read_manifest
from caliport.core.prompts import recorded_prompt
from caliport.data.pocket import PROMPTS
from tests.forking import forked

RECIPE = """
name: tiny
data: {source: pocket, train: 96, validation: 12}
base:
  shape: {vocab_size: 400, hidden_size: 64, intermediate_size: 160, layers: 2, context: 1500}
  train: {steps: 6, batch_size: 8, learning_rate: 5.0e-3, prompt_loss: true}
adapters: {summarize: , tone_casual: , translate_es: }
lora: {rank: 4, alpha: 8, train: {steps: 3, batch_size: 8, learning_rate: 5.0e-3}}
compositions:
  summarize_es: [summarize, translate_es]
  summarize_casual_es: [summarize, tone_casual, translate_es]
micro_batch: 5
calibration:
  examples: 64
  tuning: 16
  methods: [zero-shot, lora, multi-step, linear, exact, svd, ties, dare, slerp, tsv, iso-c,
            lorahub, lm-cocktail, cat, scales, scales-per-layer, lc, lc++, lc-per-layer,
            lc++-shared, lc++-alone, lc++-int4, lc++-int8-bundle, joint, mixture, flix]
  lc: {steps: 3, batch_size: 8, learning_rate: 5.0e-3}
  lc++: {steps: 3, batch_size: 8, learning_rate: [1.0e-3, 5.0e-3]}
  scales: {steps: 3, batch_size: 8, learning_rate: 5.0e-3}
  cat: {steps: 3, batch_size: 8, learning_rate: 5.0e-3}
  joint: {steps: 3, batch_size: 8, learning_rate: [1.0e-3, 5.0e-3]}
flix:
  ranks: {summarize: 2, translate: 2, casual: 1, es: 2}
  features:
    summarize: [summarize]
    translate_es: [translate, es]
    tone_casual: [casual]
    summarize_es: [summarize, es]
    summarize_casual_es: [summarize, casual, es]
  train_on: [summarize, translate_es, tone_casual, summarize_es]
  train: {steps: 3, batch_size: 8, learning_rate: 5.0e-3}
evaluation:
  examples: 4
  max_new_tokens: 4
  judge: {path: runs/tiny/base}
  quantized: {int4: [linear, lc++, lc++-int4], int8-bundle: [lc++-int8-bundle]}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("every")
    (place / "tiny.yaml").write_text(RECIPE)
    done = forked("calibrate", "tiny.yaml", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "runs" / "tiny"


def update_of(run: Path, composition: str, method: str) -> LowRankUpdate:
    return read_peft(run / "composed" / composition / method)


@pytest.mark.slow
def test_every_method_is_scored_with_its_size(run: Path) -> None:
    report = json.loads((run / "reports" / "quality.json").read_text())
    for composition, tasks in (("summarize_es", 2), ("summarize_casual_es", 3)):
        methods = {m["method"]: m for m in report["compositions"][composition]["methods"]}
        assert len(methods) == 25 + tasks
        assert methods["multi-step"]["passes"] == tasks
        sizes = {name: m["parameters"] for name, m in methods.items()}
        assert sizes["linear"] == sizes["dare"] == 0
        assert sizes["cat"] == tasks * 14, "a weight for each adapter and module of two layers"
        assert sizes["lorahub"] == sizes["lm-cocktail"] == tasks
        assert sizes["lc-per-layer"] == 2 * sizes["lc"]
        assert sizes["lc++"] == sizes["lc++-int4"] == sizes["lc++-shared"] == sizes["lc++-alone"]
        assert sizes["scales-per-layer"] == 2 * sizes["scales"]
        assert set(methods["lc++"]["quantized"]) == {"int4"}
        assert set(methods["lc++-int8-bundle"]["quantized"]) == {"int8-bundle"}
        assert methods["lc++-int4"]["quantized"]["int4"]["loss"] > 0
        assert all(0 <= m["judge"] <= 100 for m in methods.values()), "a judge that knows nothing"


@pytest.mark.slow
def test_every_adapter_is_scored_on_its_own_task(run: Path) -> None:
    audits = json.loads((run / "reports" / "audit.json").read_text())["compositions"]
    assert set(audits["summarize_es"]["own"]) == {"summarize", "translate_es"}
    own = audits["summarize_casual_es"]["own"]["tone_casual"]
    assert own["examples"] == 4
    assert own["loss"][0] > 0


@pytest.mark.slow
def test_a_shared_correction_is_the_same_in_every_composition(run: Path) -> None:
    names = ("summarize_es", "summarize_casual_es")
    found = {n: (update_of(run, n, "lc++-shared"), update_of(run, n, "linear")) for n in names}
    for module in found["summarize_es"][0].modules:
        p = [whole.delta(module) - merged.delta(module) for whole, merged in found.values()]
        torch.testing.assert_close(p[0], p[1], rtol=1e-4, atol=1e-5)
        assert p[0].abs().max() > 0


@pytest.mark.slow
def test_flix_is_the_sum_of_its_features(run: Path) -> None:
    features = {n: read_peft(run / "shared/flix" / n) for n in ("summarize", "es")}
    update = update_of(run, "summarize_es", "flix")
    for module in update.modules:
        wanted = sum(feature.delta(module) for feature in features.values())
        torch.testing.assert_close(update.delta(module), wanted, rtol=1e-4, atol=1e-6)
    rank = {update_of(run, "summarize_es", "mixture").rank(m) for m in update.modules}
    assert rank == {4}, "the most that FLix has active at once in training"


@pytest.mark.slow
def test_every_adapter_records_its_prompt(run: Path) -> None:
    for composition in ("summarize_es", "summarize_casual_es"):
        composed = sorted((run / "composed" / composition).glob("[!.]*"))
        assert len(composed) > 18
        found = {recorded_prompt(path) for path in composed}
        assert found == {PROMPTS[composition]}, "merges, shared, swept and FLix alike"
    assert recorded_prompt(run / "adapters/tone_casual") == PROMPTS["tone_casual"]


@pytest.mark.slow
def test_a_sweep_keeps_the_best_rate(run: Path) -> None:
    for method in ("lc++", "joint"):
        manifest = read_manifest(run / "composed/summarize_es" / method)
        losses = {tried["learning_rate"]: tried["loss"] for tried in manifest["sweep"]}
        assert set(losses) == {1e-3, 5e-3}
        assert manifest["learning_rate"] == min(losses, key=lambda rate: losses[rate])


@pytest.mark.slow
def test_a_feature_is_added_from_the_command_line(run: Path, tmp_path: Path) -> None:
    rows = [
        {"input": f"text {i}", "output": "texto", "features": ["summarize", "it"]}
        for i in range(16)
    ]
    (tmp_path / "it.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = run / "base"
    common = ("--base", base, "--data", tmp_path / "it.jsonl", "--steps", 3, "--batch-size", 4)
    features = run / "shared/flix"
    done = forked(
        "calibrate",
        "--method",
        "flix",
        *common,
        "--features",
        features,
        "--rank",
        "it=2",
        "--out",
        "more",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for name in ("summarize", "translate", "casual", "es"):
        old, new = (read_peft(d / name) for d in (features, tmp_path / "more"))
        assert all(torch.equal(old.b[m], new.b[m]) for m in old.modules), "others stay"
    done = forked(
        "calibrate",
        "--method",
        "exact",
        "--base",
        base,
        "--weight",
        1,
        "--weight",
        1,
        "--adapter",
        "more/summarize",
        "--adapter",
        "more/it",
        "--out",
        "both",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    both, one, other = (read_peft(tmp_path / n) for n in ("both", "more/summarize", "more/it"))
    for module in both.modules:
        wanted = one.delta(module) + other.delta(module)
        torch.testing.assert_close(both.delta(module), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("calibration.methods=[lc+]", "'lc+' is not a method; expected one of zero-shot"),
        ("calibration.methods=[lc-bundle]", "-bundle goes with -int8 or -int4"),
        ("calibration.methods=[ties-int4]", "only cat, lc, lc++, scales have variants"),
        ("calibration.methods=[lc-int4-shared]", "in this order"),
        ("export={max_size: 1MB, target_kl: 0.1}", "max_size and target_kl: expected one of them"),
        ("export={max_size: true}", "found true, expected a number"),
        ("export={target_kl: 0.1, quantizer: hqq}", "go with a quantizer that needs text"),
        ("export={tune_norms: true, ship: [fold, bundle]}", "tune_norms goes with ship: [fold]"),
        ("export={tune_norms: true}", "change what ships after lc++-int4 was trained"),
        ("calibration.methods=[cat-per-layer]", "every layer has its own already; expected cat"),
        ("calibration.weights=much", "found 'much', expected a number, search, or one for each"),
        ("calibration.weights=.nan", "a weight is nan"),
        ("calibration.weights={summarize: 1}", "expected a weight for each of summarize, "),
        ("calibration.merge=best", "expected one of dare, exact"),
        ("calibration.methods=[scales-alone]", "need the LoRAs that they scale"),
        ("calibration.tuning=0", "need calibration.tuning"),
        ("flix=null", "expected a `flix` part"),
        ("flix.train_on=[reply]", "'reply'"),
        ("flix.ranks.es=0", "flix.ranks.es"),
        ("compositions.x=[summarize, nothing]", "'nothing', which has no adapter"),
        ("calibration.tuning=500", "96 examples, 500 of them held out"),
        ("base.shape.context=40", "longer than the context of 40"),
    ],
)
def test_wrong_recipes_are_one_line(change: str, message: str, run: Path, tmp_path: Path) -> None:
    """One of them is found out when the adapters are there, which are those of ``run``."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    done = forked("calibrate", "tiny.yaml", "--set", change, "--runs", run.parent, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
