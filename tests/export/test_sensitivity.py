"""The layer that loses most at 4 bits is found, and keeping it at 8 brings the logits nearer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from caliport.core.checkpoints import load_base
from caliport.core.errors import InputError
from caliport.export.calibrated.sensitivity import Sensitivity, keep_at_int8, sensitivities
from caliport.export.quantization.tensors import (
    dequantize,
    is_quantized,
    plan,
    quantize,
    quantized_weight,
)


def test_a_layer_with_outliers_is_the_most_sensitive_and_worth_its_bits(
    base_dir: Path, prompts: list[list[int]]
) -> None:
    model = load_base(base_dir)
    spoiled = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(spoiled).weight
    with torch.no_grad():
        weight[:, ::32] *= 30  # one in each group sets the scale of the others
    names = {name: parameter.clone() for name, parameter in model.named_parameters()}
    layers = sorted(sensitivities(model, prompts), key=lambda layer: -layer.divergence)
    assert layers[0].name == spoiled
    assert {layer.name for layer in layers} == {
        name for name, form in plan(model, "int4").items() if form == "int4"
    }
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, names[name], rtol=0, atol=0)

    errors = []
    for form in ("int4", "int8"):
        found = quantize(copy.deepcopy(model), "int4", {spoiled: form})
        data, scale = quantized_weight(found.get_submodule(spoiled))
        assert scale.shape[1] == (1 if form == "int8" else data.shape[1] // 32)
        with torch.no_grad():
            ids = torch.tensor([prompts[1]])
            errors.append((dequantize(found)(ids).logits - model(ids).logits).norm())
    assert errors[1] < 0.8 * errors[0]


def test_budget() -> None:
    layers = [Sensitivity("a", 100, 1.0), Sensitivity("b", 1000, 2.0), Sensitivity("c", 100, 0.5)]
    assert keep_at_int8(layers, 0) == []
    assert keep_at_int8(layers, 60) == ["a"], "most for each byte, not most of all"
    assert keep_at_int8(layers, 600) == ["a", "b", "c"]


def test_no_prompts_are_refused(base_dir: Path) -> None:
    model = load_base(base_dir)
    with pytest.raises(InputError, match="no prompts"):
        list(sensitivities(model, []))
    with pytest.raises(InputError, match=r"int8 layers: nowhere is no linear layer"):
        quantize(model, "int4", plan(model, "int4", ["nowhere"]))
    assert not any(is_quantized(module) for module in model.modules())
