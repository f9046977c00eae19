"""Keys and values as an int8 cache holds them, and the eager model that rounds them alike.

A token's vector of one head has 8 bits, asymmetric, with a scale and a zero point of its own:
x ≈ (q - zero) · scale. ``llama.custom_quantized_sdpa`` multiplies queries rounded the same way with
the keys in integers, and weighs the values as q and scale; the cache is never dequantized whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from caliport.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from caliport.export.quantization.choices import Quantization

SCHEME = {
    "bits": 8,
    "granularity": "token and head",
    "symmetric": False,
    "scale": "float32",
    "queries": "rounded alike",
}
_LEAST, _MOST = -128, 127


def check_cache_bits(how: Quantization, runtime: str, config: PreTrainedConfig) -> None:
    """Check that the attention of a decoder can read the cache that is asked for.

    Raises:
        InputError: An int8 cache for ``onnx``, or for a decoder that caps its attention scores.
    """
    if how.cache_bits is None:
        return
    if runtime == "onnx":
        raise InputError(
            "cache_bits: found 8 with onnx, expected none: ONNX Runtime's GroupQueryAttention "
            "takes a scale for each tensor or channel, fixed by calibration, and none by token"
        )
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if capped is not None:
        raise InputError(
            f"cache_bits: found 8, expected none for config.json's attn_logit_softcapping of "
            f"{capped}: ExecuTorch's kernel for int8 caches does not cap scores"
        )


def rounded(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round the last dimension to 8 bits as ExecuTorch's operators do.

    Args:
        values: float32 [..., dim].

    Returns:
        q int8 [..., dim], scale float32 [..., 1] and zero point int8 [..., 1].
    """
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers the operators

    ops = torch.ops.quantized_decomposed
    scale, zero = ops.choose_qparams_per_token_asymmetric(values, torch.int8)
    data = ops.quantize_per_token(values, scale, zero, _LEAST, _MOST, torch.int8)
    return data, scale.float(), zero.to(torch.int8)
