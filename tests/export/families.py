"""Small decoders of the families that can be exported, each with every kind of layer it has."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

# The longest text in tests. Windows, and what rotary scaling calls the original context, are
# shorter, so that both matter.
CONTEXT = 64
WINDOW = 8

_SMALL = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Lowering takes its time for each layer: enough where only numbers set a family apart from others.
_ONE_LAYER = _SMALL | {"num_hidden_layers": 1}


def _gemma2() -> PreTrainedConfig:
    return Gemma2Config(
        **_SMALL | {"num_hidden_layers": 4},
        head_dim=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=WINDOW,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=6.0,
        query_pre_attn_scalar=24,
    )


def _gemma3() -> PreTrainedConfig:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3TextConfig(
        **_SMALL | {"num_hidden_layers": 4, "num_key_value_heads": 1},
        head_dim=32,
        layer_types=kinds,
        sliding_window=WINDOW,
        query_pre_attn_scalar=24,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
        },
    )


def _llama() -> PreTrainedConfig:
    return LlamaConfig(
        **_SMALL,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )


def _llama_dynamic() -> PreTrainedConfig:
    rope = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0}
    return LlamaConfig(**_ONE_LAYER | {"max_position_embeddings": CONTEXT}, rope_parameters=rope)


def _phi3() -> PreTrainedConfig:
    return Phi3Config(
        **_SMALL,
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    )


def _phi3_longrope() -> PreTrainedConfig:
    return Phi3Config(
        **_ONE_LAYER,
        original_max_position_embeddings=CONTEXT,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.8],
            "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        },
    )


def _qwen2() -> PreTrainedConfig:
    return Qwen2Config(**_SMALL, tie_word_embeddings=True)


def _qwen2_sliding() -> PreTrainedConfig:
    return Qwen2Config(
        **_SMALL,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["full_attention", "sliding_attention"],
    )


def _qwen3() -> PreTrainedConfig:
    return Qwen3Config(**_SMALL, head_dim=32, tie_word_embeddings=True)


def _qwen3_yarn() -> PreTrainedConfig:
    return Qwen3Config(
        **_ONE_LAYER,
        head_dim=32,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )


def _smollm2() -> PreTrainedConfig:
    return LlamaConfig(
        **_ONE_LAYER | {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96},
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )


def _smollm3() -> PreTrainedConfig:
    return SmolLM3Config(
        **_SMALL,
        no_rope_layers=[1, 0],
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )


def _stablelm2() -> PreTrainedConfig:
    return StableLmConfig(
        **_ONE_LAYER,
        use_qkv_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    )


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "llama": _llama,
    "llama-dynamic": _llama_dynamic,
    "phi3": _phi3,
    "phi3-longrope": _phi3_longrope,
    "qwen2": _qwen2,
    "qwen2-sliding": _qwen2_sliding,
    "qwen3": _qwen3,
    "qwen3-yarn": _qwen3_yarn,
    "smollm2": _smollm2,
    "smollm3": _smollm3,
    "stablelm2": _stablelm2,
}


def build(name: str) -> PreTrainedModel:
    """A family's model with fixed random weights, float32, whose attention is eager PyTorch's.

    Weights are large enough for attention to look at some tokens more than at others; norms and
    biases differ from what they start as.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[name](), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save(name: str, base_dir: Path, directory: Path) -> Path:
    """A checkpoint of a family with the tokenizer of ``base_dir``; returns ``directory``."""
    build(name).save_pretrained(directory)
    for file in base_dir.glob("*token*"):
        shutil.copy(file, directory)
    for file in base_dir.glob("*.jinja"):
        shutil.copy(file, directory)
    return directory
