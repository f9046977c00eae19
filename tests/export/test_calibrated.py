"""Integers that are chosen on calibration text: better, reproducible, resumable, and validated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from caliport.core.checkpoints import load_base, load_tokenizer
from caliport.core.errors import InputError
from caliport.export.api import export
from caliport.export.artifact import Artifact
from caliport.export.calibrated import integers as calibrated
from caliport.export.calibrated.integers import Integers
from caliport.export.calibrated.requests import decided, measured_for
from caliport.export.calibrated.sensitivity import Divergence, keep_at_int8
from caliport.export.make import fill
from caliport.export.preflight import artifact_bytes
from caliport.export.quantization.choices import Goal, Quantization
from caliport.export.quantization.quantizers import gptq, hqq, weighted
from caliport.export.quantization.quantizers.scales import pack, weighted_scales
from caliport.export.quantization.tensors import unpacked
from caliport.export.quantization.text import CalibrationText, PlainText
from caliport.export.reference.folded import eager
from caliport.export.request import Bundle, Request
from caliport.validation.gates.weights import Source, weights_gate
from caliport.validation.runners.weights import ArtifactIntegers
from tests.exports import text_of

HOW = Quantization("int4", quantizer="gptq")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> CalibrationText:
    return text_of(tmp_path_factory.mktemp("text"), 8, 256)


def values(data: Tensor, scale: Tensor) -> Tensor:
    return unpacked(data).float() * scale.float().repeat_interleave(32, 1)


def test_each_quantizer_knows_more_and_loses_less() -> None:
    """Of the layer's outputs, which is what they minimise; GPTQ by far the least."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 256, generator=generator)
    inputs = torch.randn(4096, 64, generator=generator) @ mixing * torch.rand(256).square()
    inputs += 0.05 * torch.randn(4096, 256, generator=generator)
    weight = torch.randn(96, 256, generator=generator)
    moments = inputs.T @ inputs

    def loss(parts: tuple[Tensor, Tensor]) -> float:
        return float(((values(*parts) - weight) @ inputs.T).square().mean())

    plain = loss(hqq.in_groups(weight))
    by_squares = loss(weighted.in_weighted_groups(weight, weighted.importance_of(moments)))
    by_feedback = loss(gptq.by_error_feedback(weight, gptq.prepare(moments)))
    assert by_squares < 0.95 * plain
    assert by_feedback < 0.5 * by_squares


def test_without_correlation_error_feedback_changes_nothing() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    moments = torch.diag(torch.linspace(1, 2, 64))
    found = gptq.by_error_feedback(weight, gptq.prepare(moments))
    nearest = weighted.in_weighted_groups(weight, weighted.importance_of(moments))
    for part, other in zip(found, nearest, strict=True):
        torch.testing.assert_close(part, other, rtol=0, atol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-20, 1.0, 1e10]))
def test_scales_are_positive_bfloat16_and_no_worse_than_the_largest_value(
    seed: int, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 64, generator=generator) * size
    importance = torch.rand(64, generator=generator) + 1e-3
    scales = weighted_scales(weight, importance)
    assert (scales > 0).all()

    def error(scale: Tensor) -> Tensor:
        steps = scale.float().repeat_interleave(32, 1)
        off = (weight / steps).round().clamp(-8, 7) * steps - weight
        return (off.square() * importance).unflatten(1, (2, 32)).sum(-1)

    largest = (weight.unflatten(1, (2, 32)).abs().amax(-1) / 7.5).bfloat16().clamp_min(1e-8)
    assert (error(scales) <= error(largest) * (1 + 1e-5)).all()


@given(st.lists(st.integers(-8, 7), min_size=32, max_size=32))
def test_packing_is_what_both_runtimes_unpack(integers: list[int]) -> None:
    row = torch.tensor([integers], dtype=torch.int8)
    assert torch.equal(unpacked(pack(row)), row)


def test_moments_are_those_of_the_whole_model(
    base_dir: Path,
    adapter_dirs: list[Path],
    text: CalibrationText,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layer by layer, folded or beside, each layer is fed what the whole float model feeds it."""
    seen: dict[str, Tensor] = {}
    groups = calibrated._Moments.groups

    def spy(self: calibrated._Moments, names: dict[str, Tensor]) -> list[list[str]]:
        found = groups(self, names)
        seen.update({name: self._sums[same[0]].clone() for same in found for name in same})
        return found

    monkeypatch.setattr(calibrated._Moments, "groups", spy)
    model = eager(base_dir, adapter_dirs[0], "fp32")
    sequences = text.sequences(load_tokenizer(base_dir), model)[""]
    expected: dict[str, Tensor] = {}

    def collect(name: str) -> object:
        def hook(_: object, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            expected[name] = expected.get(name, torch.zeros(())) + x.T @ x

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(collect(name))
    with torch.no_grad():
        for sequence in sequences:
            model(torch.tensor([sequence]))
    beside = CalibrationText({"one": text.sources[""]}, text.tokens)
    for request in (
        Request(base_dir, "onnx", HOW, 64, adapter_dirs[0], text=text),
        Request(base_dir, "onnx", HOW, 64, None, Bundle({"one": adapter_dirs[0]}), beside),
    ):
        seen.clear()
        place = tmp_path / str(request.bundle is None)
        place.mkdir()
        fill(place, {}, request)
        assert set(seen) == set(expected)
        for name, found in seen.items():
            torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-3)


def test_what_was_killed_goes_on_and_gives_the_same_bytes(
    base_dir: Path, text: CalibrationText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(base_dir, "onnx", HOW, 64, text=text)
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    fill(tmp_path / "undisturbed", {}, request, integers=tmp_path / "a")
    layer, begun = calibrated._Pass._layer, []

    def killed(self: calibrated._Pass, index: int, hidden: dict[str, list[Tensor]]) -> object:
        begun.append(index)
        if begun == [0, 1]:
            raise KeyboardInterrupt
        return layer(self, index, hidden)

    monkeypatch.setattr(calibrated._Pass, "_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "killed", {}, request, integers=tmp_path / "b")
    fill(tmp_path / "killed", {}, request, integers=tmp_path / "b")
    layers = load_base(base_dir).config.num_hidden_layers
    assert begun == [0, 1, *range(1, layers)]
    name = "model.onnx.data"
    same = [(tmp_path / place / name).read_bytes() for place in ("undisturbed", "killed")]
    assert same[0] == same[1]
    fill(tmp_path / "killed", {}, request, integers=tmp_path / "b")
    assert begun == [0, 1, *range(1, layers)], "found before, taken again"


@pytest.fixture(scope="module", params=["onnx", "executorch"])
def artifact(
    request: pytest.FixtureRequest,
    base_dir: Path,
    adapter_dirs: list[Path],
    text: CalibrationText,
    tmp_path_factory: pytest.TempPathFactory,
) -> Artifact:
    """Of both runtimes; that of executorch with tuned gains too."""
    out = tmp_path_factory.mktemp("calibrated") / request.param
    how = replace(HOW, tune_norms=request.param == "executorch")
    asked = {"runtime": request.param, "precision": how, "context": 64, "text": text}
    return export(base_dir, out, adapter=adapter_dirs[0], **asked)


@pytest.mark.slow
def test_an_artifact_says_on_what_and_holds_what_it_says(
    artifact: Artifact, base_dir: Path, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    manifest = artifact.manifest
    assert manifest["scheme"]["linear"]["algorithm"] == "gptq"
    assert manifest["calibration"]["tokens"] == 256
    assert "calibration text" in manifest["inputs"]
    integers = ArtifactIntegers(artifact, base_dir)
    assert integers.changed() == []
    assert bool(integers.replaced) == artifact.quantization.tune_norms
    gate = weights_gate(artifact, Source(base_dir, adapter_dirs[0]))
    assert gate.passed, gate.reason
    for adapter, reason in (
        (adapter_dirs[1], "made from another adapter"),
        (None, "made with an adapter, none was given"),
    ):
        gate = weights_gate(artifact, Source(base_dir, adapter))
        assert not gate.passed
        assert reason in gate.reason


@pytest.mark.slow
def test_the_artifact_computes_with_its_integers(
    artifact: Artifact, base_dir: Path, adapter_dirs: list[Path], prompts: list[list[int]]
) -> None:
    from caliport.api import load
    from caliport.export.reference.folded import reference

    known = ArtifactIntegers(artifact, base_dir)
    model = reference(base_dir, adapter_dirs[0], HOW, artifact.runtime, known=known)
    plain = reference(base_dir, adapter_dirs[0], "int4", artifact.runtime)
    found = load(artifact).prefill(prompts[1])
    with torch.no_grad():
        ids = torch.tensor([prompts[1]])
        near, far = (m(ids).logits[0, -1].numpy() for m in (model, plain))
    assert np.abs(found - near).max() < 0.2 * np.abs(found - far).max()


def test_changed_integers_are_told(base_dir: Path, text: CalibrationText, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(base_dir, out, runtime="onnx", precision=HOW, context=64, text=text)
    manifest = json.loads((out / "manifest.json").read_text())
    name = next(iter(manifest["calibration"]["weights"]))
    manifest["calibration"]["weights"][name][0] = "0" * 32
    (out / "manifest.json").write_text(json.dumps(manifest))
    gate = weights_gate(Artifact.read(out), Source(base_dir, None))
    assert not gate.passed
    assert gate.stage == "lowering"
    assert "1 of" in gate.reason


def test_text_goes_with_the_quantizers_that_read_it(
    base_dir: Path, text: CalibrationText, tmp_path: Path
) -> None:
    def refused(words: str, how: Quantization, given: CalibrationText | None) -> None:
        with pytest.raises(InputError, match=words):
            export(base_dir, tmp_path / "out", runtime="onnx", precision=how, text=given)
        assert not (tmp_path / "out").exists()

    expected = "expected gptq or hqq or weighted"
    for name in ("awq", "max-abs", "a\nb"):
        refused(expected, Quantization("int4", quantizer=name), text)
    with pytest.raises(InputError, match="quantizer: goes with int4, found int8"):
        Quantization("int8", quantizer="gptq")
    refused("quantizer gptq measures on text", HOW, None)
    refused("calibration text goes with", Quantization("int8"), text)
    refused("calibration text goes with", Quantization("int4"), text)
    empty = tmp_path / "empty.txt"
    empty.write_text("too short")
    refused("tokens, expected at least", HOW, CalibrationText({"": PlainText(empty)}))
    empty.write_bytes(b"\xff" * 1000)
    refused("not UTF-8 text", HOW, CalibrationText({"": PlainText(empty)}))
    gone = CalibrationText({"": PlainText(tmp_path / "gone")})
    refused("gone: not readable", HOW, gone)
    other = CalibrationText({"summarise": text.sources[""]})
    refused("found one for 'summarise', which is no composition", HOW, other)
    with pytest.raises(InputError, match="calibration tokens: found 3"):
        CalibrationText({"": PlainText(empty)}, 3)


def test_a_directory_that_was_half_emptied_is_not_resumed(tmp_path: Path) -> None:
    """Wherever emptying is killed, no integers of another text are left behind a new key."""
    for name in ("hidden.safetensors", "layer-0000.safetensors", "head.safetensors"):
        (tmp_path / name).write_bytes(b"of another text")
    calibrated._begin(tmp_path, {"text": "new"})
    assert [path.name for path in tmp_path.iterdir()] == ["key.json"]
    (tmp_path / "hidden.safetensors").write_bytes(b"of this text")
    calibrated._begin(tmp_path, {"text": "new"})
    assert (tmp_path / "hidden.safetensors").exists()


def test_integers_are_read_by_module(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    parts = {"a.b.data": torch.zeros(2, 16, dtype=torch.uint8), "a.b.scale": torch.ones(2, 1)}
    save_file(parts, tmp_path / "layer-0000.safetensors")
    save_file({":0": torch.zeros(1)}, tmp_path / "hidden.safetensors")
    found = Integers(tmp_path)
    assert "a.b" in found
    assert "" not in found
    assert torch.equal(found.parts("a.b")[1], torch.ones(2, 1))


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> CalibrationText:
    """Text of which two thirds are left to measure on."""
    return text_of(tmp_path_factory.mktemp("longer"), 60, 256)


def test_what_is_measured_on_was_not_calibrated_on(longer: CalibrationText, base_dir: Path) -> None:
    model = load_base(base_dir)
    tokenizer = load_tokenizer(base_dir)
    taken = longer.sequences(tokenizer, model)[""]
    left = longer.held_out(tokenizer, model, 300)
    assert 200 < sum(map(len, left)) <= 300
    everything = longer.sources[""].sequences(tokenizer, model)
    places = [[everything.index(s) for s in part if s in everything] for part in (taken, left)]
    assert not set(places[0]) & set(places[1])


def test_bits_go_where_they_gain_most_for_their_bytes(
    base_dir: Path, longer: CalibrationText, tmp_path: Path
) -> None:
    """A divergence is reached with fewer layers than all, and a size is kept to."""
    plain = Request(base_dir, "onnx", HOW, 96, text=longer)
    found = measured_for(plain, tmp_path / "integers")
    none, every = found.divergence([]), found.divergence(found.order())
    assert every < 0.1 * none
    target = 0.5 * none
    request = replace(plain, goal=Goal(target_kl=target))
    chosen, _, facts = decided(request, tmp_path / "integers", artifact_bytes)
    names = chosen.quantization.int8_layers
    assert 0 < len(names) < len(found.layers)
    assert facts["bits"]["kl"] <= target < facts["bits"]["kl_without"] == none
    spent = sum(layer.extra_bytes for layer in found.layers if layer.name in names)
    smallest = min(layer.extra_bytes for layer in found.layers)
    assert found.divergence(keep_at_int8(found.layers, spent - smallest)) > target

    least = artifact_bytes(plain)
    most = least + 20_000
    artifact = export(
        base_dir,
        tmp_path / "a",
        runtime="onnx",
        precision=HOW,
        context=96,
        text=longer,
        goal=Goal(most),
    )
    kept = artifact.quantization.int8_layers
    assert kept
    sizes = sum(file.stat().st_size for file in artifact.directory.iterdir())
    assert sizes <= most
    with pytest.raises(InputError, match=r"size: found .* MB with every layer in 4 bits, expected"):
        decided(replace(plain, goal=Goal(least - 1)), tmp_path / "integers", artifact_bytes)
    with pytest.raises(InputError, match=r"loss: found .* with every layer in 8 bits, expected"):
        decided(replace(plain, goal=Goal(target_kl=1e-9)), tmp_path / "integers", artifact_bytes)


def test_measured_losses_are_kept(
    base_dir: Path, longer: CalibrationText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was measured before a kill is not measured again."""
    request = Request(base_dir, "onnx", HOW, 96, text=longer)
    first = measured_for(request, tmp_path)
    measured = []
    monkeypatch.setattr(
        Divergence, "of", lambda self, values: measured.append(sorted(values)) or 0.0
    )
    file = tmp_path / "losses.json"
    content = json.loads(file.read_text())
    dropped = first.layers[-1].name
    del content["layers"][dropped]
    file.write_text(json.dumps(content))
    second = measured_for(request, tmp_path)
    assert [dropped in names for names in measured] == [True]
    assert [x.divergence for x in second.layers[:-1]] == [x.divergence for x in first.layers[:-1]]
