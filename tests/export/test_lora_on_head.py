"""A LoRA on the head, also of a base that ties it to the embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_adapter
from safetensors.torch import load_file, save_file


def on_the_head(base: Path, out: Path) -> Path:
    targets = ["lm_head", "q_proj"]
    random_adapter(base, out, seed=3, target_modules=targets, ensure_weight_tying=False)
    weights = load_file(out / "adapter_model.safetensors")
    lora = {name: value for name, value in weights.items() if ".lora_" in name}
    save_file(lora, out / "adapter_model.safetensors")
    return out


def check_logits(found: Any, model: Any, prompt: list[int]) -> None:
    """Equal but for activations that round to a neighbor; a head without its update is far off."""
    with torch.no_grad():
        wanted = model(torch.tensor([prompt])).logits[0, -1]
    near = 1e-2 * float(wanted.abs().max())
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=0, atol=near)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_lora_on_a_tied_head(base_dir: Path, tmp_path: Path, precision: str) -> None:
    """The head is updated and the embedding is not; the reference sees the same forms."""
    import caliport
    from caliport.export.reference.folded import reference

    adapter, prompt = on_the_head(base_dir, tmp_path / "a"), [5, 6, 7, 8]
    made = caliport.export(
        base_dir, tmp_path / "out", runtime="onnx", adapter=adapter, precision=precision, context=64
    )
    model = reference(base_dir, adapter, precision, "onnx")
    check_logits(caliport.load(made).prefill(prompt), model, prompt)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_an_onnx_bundle_updates_the_head(base_dir: Path, tmp_path: Path, precision: str) -> None:
    import caliport
    from caliport.export.quantization.choices import Quantization
    from caliport.export.reference.beside import reference

    adapter, prompt = on_the_head(base_dir, tmp_path / "a"), [5, 6, 7, 8]
    bundle = {"head": adapter}
    made = caliport.export(
        base_dir, tmp_path / "out", runtime="onnx", bundle=bundle, precision=precision, context=64
    )
    for name, update in ((None, None), ("head", adapter)):
        model = reference(base_dir, update, Quantization(precision), "onnx")
        check_logits(caliport.load(made, composition=name).prefill(prompt), model, prompt)
