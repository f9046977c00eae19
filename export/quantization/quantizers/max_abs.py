"""8-bit rows by their largest absolute value, as torchao quantizes symmetrically."""

from __future__ import annotations

import torch
from torch import Tensor

from caliport.export.quantization.quantizers.registry import Quantizer


def by_row(weight: Tensor, inputs: None = None) -> tuple[Tensor, Tensor]:
    """Quantize each row with one scale, its largest absolute value over 127.5.

    Args:
        weight: float32 [n, width].

    Returns:
        The integers, int8 [n, width], and the positive scales, float32 [n, 1].
    """
    scale = (weight.abs().amax(1, keepdim=True) / 127.5).clamp_min_(torch.finfo(torch.float32).eps)
    return (weight * (1 / scale)).round_().clamp_(-128, 127).to(torch.int8), scale


QUANTIZER = Quantizer(
    bits=8,
    algorithm="max-abs",
    source="torchao 0.18, MappingType.SYMMETRIC",
    quantize=by_row,
    description="the largest absolute value of a row",
)
