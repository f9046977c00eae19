"""Layers that are traced once and repeated give the graph of the whole decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from caliport.core.checkpoints import load_tokenizer
from caliport.core.directories import read_manifest
from caliport.core.errors import InputError
from caliport.export.decoder.shipped import ShippedDecoder, every
from caliport.export.decoder.skeleton import Layers
from caliport.export.onnx import lower as lowering
from caliport.export.reference.folded import eager
from caliport.validation.runners.onnx import OnnxRunner
from tests.exports import to_onnx

CONTEXT = 48


@pytest.fixture(scope="module")
def deep_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers."""
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
    )
    directory = tmp_path_factory.mktemp("deep")
    Qwen2ForCausalLM(config).save_pretrained(directory)
    load_tokenizer(base_dir).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return [int(token) for token in np.random.default_rng(1).integers(5, 300, CONTEXT)]


def test_repeated_layers_equal_layers_traced_one_by_one(
    deep_dir: Path, tmp_path: Path, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated = to_onnx(deep_dir, tmp_path / "repeated", precision="int4", context=CONTEXT)
    monkeypatch.setattr(lowering, "group", every)
    whole = to_onnx(deep_dir, tmp_path / "whole", precision="int4", context=CONTEXT)
    operators = [read_manifest(out)["lowering"]["operators"] for out in (repeated, whole)]
    assert operators[0] == operators[1]
    found, expected = (OnnxRunner(out, threads=1).prefill(tokens) for out in (repeated, whole))
    np.testing.assert_array_equal(found, expected)


def test_layers_that_use_one_another_are_all_traced(
    deep_dir: Path, tmp_path: Path, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the third layer on, each adds what the second one read."""
    plain, read, tried = Qwen2DecoderLayer.forward, [], []

    def forward(self: Qwen2DecoderLayer, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        index = self.self_attn.layer_idx
        if index == 0:
            read.clear()
        read.append(hidden_states)
        return plain(self, hidden_states + read[1] if index > 1 else hidden_states, **kwargs)

    def three(decoder: ShippedDecoder) -> Layers:
        tried.append(decoder)
        return Layers("model.layers", [0, 1, 2], [0, 1, 2, 2, 2])

    monkeypatch.setattr(Qwen2DecoderLayer, "forward", forward)
    monkeypatch.setattr(lowering, "group", three)
    out = to_onnx(deep_dir, tmp_path / "out", precision="fp32", context=CONTEXT)
    assert len(tried) == 1
    model = eager(deep_dir, None, "fp32")
    with torch.no_grad():
        expected = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].numpy()
    found = OnnxRunner(out, threads=1).prefill(tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


def test_a_weight_used_outside_of_its_layer_is_refused(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing stays unquantized in silence."""

    def forward(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        gate = nn.functional.linear(x, self.gate_proj.weight)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(InputError, match=r"gate_proj\.weight: used outside of its layer"):
        to_onnx(base_dir, tmp_path / "out", precision="int4", context=CONTEXT)
    assert not list(tmp_path.iterdir())
