"""Rounding of keys and values in an int8 cache.

Each token's vector of one head is stored in 8 bits, asymmetric, with its own scale and zero point:
x ≈ (q - zero) · scale. ``llama.custom_quantized_sdpa`` rounds queries the same way, multiplies them
with the keys in integers, and weights the values as q and scale; the cache is never dequantized
whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCHEME = {
    "bits": 8,
    "granularity": "token and head",
    "symmetric": False,
    "scale": "float32",
    "queries": "rounded alike",
}
_LEAST, _MOST = -128, 127


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
