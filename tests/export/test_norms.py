"""Gains tuned to the integers bring a decoder nearer to the float one, and are what ships."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div

from caliport.core.checkpoints import load_base, load_tokenizer
from caliport.core.errors import InputError
from caliport.export.api import export
from caliport.export.artifact import Artifact
from caliport.export.calibrated import norms
from caliport.export.calibrated.integers import Integers
from caliport.export.calibrated.requests import decided
from caliport.export.decoder.shipped import planned
from caliport.export.make import make
from caliport.export.preflight import artifact_bytes
from caliport.export.quantization.choices import NORMS, Quantization
from caliport.export.quantization.tensors import as_shipped
from caliport.export.quantization.text import CalibrationText
from caliport.export.request import Bundle, Request
from caliport.validation.runners.weights import ArtifactIntegers
from tests.exports import text_of

HOW = Quantization("int4", quantizer="gptq", tune_norms=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> CalibrationText:
    return text_of(tmp_path_factory.mktemp("text"), 60, 2048)


def test_tuned_gains_bring_it_nearer_on_other_text(
    base_dir: Path, text: CalibrationText, tmp_path: Path
) -> None:
    request = Request(base_dir, "onnx", HOW, 64, text=text)
    _, source, _ = decided(request, tmp_path, artifact_bytes)
    assert source is not None
    model = load_base(base_dir)
    known, untuned = Integers(tmp_path, tuned=True), Integers(tmp_path)
    assert set(known.replaced) == {n for n, p in model.named_parameters() if p.dim() == 1}
    texts = text.held_out(load_tokenizer(base_dir), model, 1024)

    def loss(known: Integers) -> float:
        other = as_shipped(model, HOW, known=known)
        with torch.no_grad():
            pairs = [
                [m(torch.tensor([ids])).logits[0].log_softmax(-1) for m in (other, model)]
                for ids in texts
            ]
        return sum(float(kl_div(a, b, log_target=True, reduction="sum")) for a, b in pairs)

    assert loss(known) < 0.95 * loss(untuned)


def test_others_that_share_the_integers_do_not_get_the_gains(
    base_dir: Path, text: CalibrationText, tmp_path: Path
) -> None:
    request = Request(base_dir, "onnx", HOW, 64, text=text)
    _, source, _ = decided(request, tmp_path, artifact_bytes)
    plan = planned(base_dir, None, HOW)
    assert source is not None
    assert source(plan).replaced
    plain = replace(request, quantization=replace(HOW, tune_norms=False))
    _, source, _ = decided(plain, tmp_path, artifact_bytes)
    assert source is not None
    assert not source(plan).replaced
    other = replace(HOW, int8_layers=("model.layers.0.mlp.down_proj",))
    gains = []
    for place in (tmp_path, tmp_path / "alone"):
        decided(replace(request, quantization=other), place, artifact_bytes)
        gains.append(Integers(place, tuned=True).replaced)
    for name, gain in gains[0].items():
        assert torch.equal(gain, gains[1][name]), "begun anew, not from gains for other bits"


def test_what_was_killed_goes_on_and_gives_the_same_gains(
    base_dir: Path, text: CalibrationText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(base_dir, "onnx", HOW, 64, text=text)
    decided(request, tmp_path / "a", artifact_bytes)
    said, steps = norms.at, []

    def killed(what: str, step: int, of: int) -> None:
        steps.append(step)
        if steps.count(10) == 1 and step == 10:
            raise KeyboardInterrupt
        said(what, step, of)

    monkeypatch.setattr(norms, "at", killed)
    with pytest.raises(KeyboardInterrupt):
        decided(request, tmp_path / "b", artifact_bytes)
    assert not (tmp_path / "b" / NORMS).exists()
    decided(request, tmp_path / "b", artifact_bytes)
    assert steps[:12] == [*range(11), 8], "goes on after the last state that was kept"
    assert (tmp_path / "a" / NORMS).read_bytes() == (tmp_path / "b" / NORMS).read_bytes()
    count = len(steps)
    decided(request, tmp_path / "b", artifact_bytes)
    assert len(steps) == count, "found before, taken again"


def test_bad_gains_are_told(base_dir: Path, text: CalibrationText, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(base_dir, out, runtime="onnx", precision=HOW, context=64, text=text)
    gains = load_file(out / NORMS)
    first = next(iter(gains))
    for bad, words in (
        ({**gains, first: gains[first] * float("inf")}, f"{first}: expected finite"),
        ({**gains, first: gains[first].double()}, f"{first}: expected finite float32"),
        ({**gains, first: torch.ones(3)}, "expected the gains of the base's normalizations"),
        ({**gains, "lm_head.weight": torch.ones(3)}, "expected the gains of the base's"),
    ):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(out, copy)
        save_file(bad, copy / NORMS)
        manifest = json.loads((copy / "manifest.json").read_text())
        artifact = replace(Artifact.read(out), directory=copy, manifest=manifest)
        with pytest.raises(InputError, match=words):
            _ = ArtifactIntegers(artifact, base_dir).replaced


def test_they_go_with_text_and_a_fold(
    base_dir: Path, adapter_dirs: list[Path], text: CalibrationText, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="tune_norms: goes with int4 and a quantizer"):
        Quantization("int8", tune_norms=True)
    bundle = Bundle({"one": adapter_dirs[0]})
    beside = CalibrationText({"one": text.sources[""]}, text.tokens)
    for request in (
        Request(base_dir, "onnx", replace(HOW, quantizer="hqq"), 64, text=text),
        Request(base_dir, "onnx", HOW, 64, bundle=bundle, text=beside),
    ):
        with pytest.raises(InputError, match="tune_norms: goes with int4, a quantizer that needs"):
            make(request, tmp_path / "out")
