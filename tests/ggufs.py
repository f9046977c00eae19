"""Tiny ``.gguf`` files, written from a Llama's Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

LAYERS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def write_gguf(
    base: Path,
    out: Path,
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Write a Llama as llama.cpp's converter does.

    ``fields`` and ``tensors`` are added or put in place of its own; None leaves one out.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    writer = gguf.GGUFWriter(out, "llama")
    found = {**_fields(model.config, AutoTokenizer.from_pretrained(base)), **(fields or {})}
    for key, value in found.items():
        if value is None:
            continue
        if key == "general.architecture":
            writer.kv_data[0][key].value = value
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, value in {**_tensors(model), **(tensors or {})}.items():
        if value is None:
            continue
        data, raw = np.ascontiguousarray(value, dtype=np.float32), None
        if data.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            data, raw = gguf.quantize(data, kind), kind
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _fields(config: Any, tokenizer: Any) -> dict[str, Any]:
    import json

    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    special = set(tokenizer.all_special_tokens)
    return {
        "general.name": "tiny",
        "llama.context_length": config.max_position_embeddings,
        "llama.block_count": config.num_hidden_layers,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in backend["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }


def _tensors(model: Any) -> dict[str, np.ndarray]:
    config, state = model.config, model.state_dict()
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    for layer in range(config.num_hidden_layers):
        for name, theirs in LAYERS.items():
            value = state[f"model.layers.{layer}.{theirs}.weight"]
            if name in heads:  # ggml turns neighbours, transformers the two halves
                value = value.unflatten(0, (heads[name], 2, -1)).transpose(1, 2).flatten(0, 2)
            found[f"blk.{layer}.{name}.weight"] = value
    return {name: value.numpy() for name, value in found.items()}
