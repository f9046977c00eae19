"""Convert the checkpoint to Meta's format, which ExecuTorch's ``export_llm`` reads.

ExecuTorch's converters are for torchtune or other models, so this does the same for a Llama: rename
tensors, and reorder the rows of queries and keys for Meta's rotary embedding, which rotates
neighbouring values where transformers rotates the two halves of a head.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CHECKPOINT, PARAMETERS = "consolidated.00.pth", "params.json"

_NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
}


def write_meta(checkpoint: Path, out: Path) -> None:
    """Write ``consolidated.00.pth`` and ``params.json`` into ``out``; tied weights stay tied.

    Args:
        checkpoint: A directory from ``write_checkpoint``.
        out: The directory to write to; created if needed.
    """
    import torch
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    heads = {
        "attention.wq": config["num_attention_heads"],
        "attention.wk": config["num_key_value_heads"],
    }
    weights: dict[str, Tensor] = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        meta = _OUTSIDE.get(name) or _layer_name(name)
        part = meta.split(".", 2)[-1].removesuffix(".weight")
        weights[meta] = interleave(weight, heads[part]) if part in heads else weight
    weights["output.weight"] = weights["tok_embeddings.weight"]
    out.mkdir(parents=True, exist_ok=True)
    torch.save(weights, out / CHECKPOINT)
    text = json.dumps(_parameters(config), indent=2)
    (out / PARAMETERS).write_text(text + "\n", encoding="utf-8")


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Reorder rows from [head, half, pair] to [head, pair, half]; ``weight`` is [rows, columns]."""
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def _layer_name(name: str) -> str:
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"layers.{layer}.{_NAMES[part]}.weight"


def _parameters(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "hidden_dim": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": rope.get("rope_theta") or config["rope_theta"],
        "use_scaled_rope": rope.get("rope_type") == "llama3",
    }
