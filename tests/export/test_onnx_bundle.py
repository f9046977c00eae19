"""Every composition of a bundle gives the logits of the quantized base with ΔW beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
import pytest
import torch
from conftest import random_adapter

from caliport.calibrate.peft_files import read_peft
from caliport.core.directories import check_files, read_manifest
from caliport.core.errors import InputError
from caliport.export.api import add_composition
from caliport.export.decoder.terms import split
from caliport.export.quantization.tensors import dequantize
from caliport.export.reference.beside import beside
from caliport.export.reference.folded import eager
from caliport.validation.runners.onnx import OnnxRunner, generate_ids
from tests.exports import to_onnx_bundle

CONTEXT = 96
TOKENS = [int(token) for token in np.random.default_rng(5).integers(5, 300, 40)]


@pytest.fixture(scope="module")
def adapters(
    base_dir: Path, adapter_dirs: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """All layers at rank 4; two kinds of layers at rank 6."""
    few = random_adapter(
        base_dir,
        tmp_path_factory.mktemp("few"),
        seed=9,
        rank=6,
        target_modules=["q_proj", "down_proj"],
    )
    return {"all": adapter_dirs[0], "few": few}


@pytest.fixture(scope="module")
def bundle_of(
    base_dir: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("bundle")

    def bundle(precision: str) -> Path:
        if precision not in made:
            made[precision] = to_onnx_bundle(
                base_dir, adapters, root / precision, precision=precision, context=CONTEXT
            )
        return made[precision]

    return bundle


def expected_logits(base: Path, adapter: Path | None, precision: str) -> np.ndarray:
    """Of the quantized base's own values with ΔW beside them, after every token: [n, vocab]."""
    model = eager(base, None, precision)
    if precision != "fp32":
        model = dequantize(model)
    if adapter is not None:
        model = beside(model, split(read_peft(adapter), {}), {})
    with torch.no_grad():
        return model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy()


@pytest.mark.parametrize("precision", ["int4", "int8", "fp32"])
@pytest.mark.parametrize("name", [None, "all", "few"])
def test_a_composition_gives_eagers_logits(
    bundle_of: Callable[[str], Path],
    base_dir: Path,
    adapters: dict[str, Path],
    precision: str,
    name: str | None,
) -> None:
    bundle = bundle_of(precision)
    check_files(bundle)
    file = None if name is None else bundle / f"{name}.onnx_adapter"
    expected = expected_logits(base_dir, None if name is None else adapters[name], precision)
    runner = OnnxRunner(bundle, threads=1, float_activations=True, adapter=file)
    for size in (1, 13, len(TOKENS)):
        runner.reset()
        for start in range(0, len(TOKENS), size):
            row = runner.extend(TOKENS[start : start + size])
            end = min(start + size, len(TOKENS))
            np.testing.assert_allclose(row, expected[end - 1], atol=1e-4, rtol=0)


def genai_tokens(model: genai.Model, adapters: genai.Adapters, name: str | None) -> list[int]:
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(TOKENS) + 12, do_sample=False)
    generator = genai.Generator(model, settings)
    if name is not None:
        generator.set_active_adapter(adapters, name)
    generator.append_tokens(np.array([TOKENS], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(TOKENS) :]]


def test_stock_generator_switches_compositions(
    bundle_of: Callable[[str], Path], base_dir: Path, adapters: dict[str, Path]
) -> None:
    """One loaded model, back and forth, against artifacts with ΔW folded in."""
    bundle = bundle_of("fp32")
    model = genai.Model(str(bundle))
    loaded = genai.Adapters(model)
    for name in adapters:
        loaded.load(str(bundle / f"{name}.onnx_adapter"), name)
    found = {n: genai_tokens(model, loaded, n) for n in ("all", None, "few")}
    assert found["all"] == genai_tokens(model, loaded, "all")
    assert len({tuple(tokens) for tokens in found.values()}) == 3
    assert found[None] == generate_ids(bundle, TOKENS, 12)
    assert found["few"] == generate_ids(bundle, TOKENS, 12, bundle / "few.onnx_adapter")
    for name, adapter in [*adapters.items(), (None, None)]:
        logits = expected_logits(base_dir, adapter, "fp32")
        assert found[name][0] == logits[-1].argmax()


def test_the_graph_alone_is_the_base(bundle_of: Callable[[str], Path]) -> None:
    bundle = bundle_of("int4")
    alone = OnnxRunner(bundle, threads=1).prefill(TOKENS)
    other = OnnxRunner(bundle, threads=1, adapter=bundle / "few.onnx_adapter").prefill(TOKENS)
    assert np.abs(alone - other).max() > 0.1


def test_a_composition_costs_its_parameters(
    bundle_of: Callable[[str], Path], adapters: dict[str, Path]
) -> None:
    bundle = bundle_of("int4")
    facts = read_manifest(bundle)["bundle"]["compositions"]
    for name, adapter in adapters.items():
        update = read_peft(adapter)
        size = (bundle / f"{name}.onnx_adapter").stat().st_size
        assert facts[name]["parameters"] == update.parameter_count
        assert size < 4 * update.parameter_count + 400 * len(update.modules)


def test_a_composition_can_be_added_later(
    bundle_of: Callable[[str], Path],
    base_dir: Path,
    adapter_dirs: list[Path],
    tmp_path: Path,
) -> None:
    bundle = shutil.copytree(bundle_of("int8"), tmp_path / "bundle")
    before = (bundle / "model.onnx").stat().st_mtime_ns
    file = add_composition(bundle, "later", adapter_dirs[1])
    check_files(bundle)
    assert (bundle / "model.onnx").stat().st_mtime_ns == before
    assert "later" in read_manifest(bundle)["bundle"]["compositions"]
    expected = expected_logits(base_dir, adapter_dirs[1], "int8")[-1]
    runner = OnnxRunner(bundle, threads=1, float_activations=True, adapter=file)
    np.testing.assert_allclose(runner.prefill(TOKENS), expected, atol=1e-4, rtol=0)
    first = file.read_bytes()
    assert add_composition(bundle, "later", adapter_dirs[1]).read_bytes() == first


def test_layers_can_be_limited(base_dir: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    bundle = to_onnx_bundle(
        base_dir, {}, tmp_path / "bundle", context=CONTEXT, modules=["down_proj"]
    )
    modules = read_manifest(bundle)["bundle"]["modules"]
    assert [name.rpartition(".")[2] for name in modules] == ["down_proj"] * 2
    with pytest.raises(InputError, match=r"updates model\.layers\.0\.self_attn\.q_proj, which"):
        add_composition(bundle, "few", adapters["few"])
    assert not (bundle / "few.onnx_adapter").exists()
    check_files(bundle)


def test_wrong_inputs_are_one_line(
    bundle_of: Callable[[str], Path], base_dir: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    bundle = shutil.copytree(bundle_of("int8"), tmp_path / "bundle")
    with pytest.raises(InputError, match=r"composition '\.\./up': expected a name"):
        add_composition(bundle, "../up", adapters["all"])
    with pytest.raises(InputError, match="ends the name of no linear layer"):
        to_onnx_bundle(base_dir, {}, tmp_path / "no", context=CONTEXT, modules=["proj_q"])
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["bundle"]["modules"]["model.layers.1.mlp.up_proj"] = [7, 7]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="made for another base"):
        add_composition(bundle, "all", adapters["all"])
    del manifest["bundle"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="expected one for onnx"):
        add_composition(bundle, "all", adapters["all"])
    (bundle / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="runtime is None, expected executorch or onnx"):
        add_composition(bundle, "all", adapters["all"])
    (bundle / "manifest.json").unlink()
    (bundle / "all.onnx_adapter").write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match="not an adapter of ONNX Runtime"):
        OnnxRunner(bundle, adapter=bundle / "all.onnx_adapter")
