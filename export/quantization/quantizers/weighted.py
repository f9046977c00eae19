"""4-bit groups whose scales are weighted by the squares of the layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from caliport.export.quantization.choices import GROUP_SIZE
from caliport.export.quantization.quantizers.registry import Quantizer
from caliport.export.quantization.quantizers.scales import pack, weighted_scales


def importance_of(moments: Tensor) -> Tensor:
    """The inputs' squares, float32 [width], of their moments [width, width]; never all 0."""
    squares = moments.diagonal().float()
    return (squares + squares.mean() * 1e-6).clamp_min(1e-20)


def in_weighted_groups(weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Round to the nearest integer with scales by ``weighted_scales``.

    Args:
        weight: float32 [n, width], whole groups of 32.
        importance: float32 [width].

    Returns:
        Packed integers, uint8 [n, width / 2], and scales, bfloat16 [n, width / 32].
    """
    scales = weighted_scales(weight, importance)
    steps = scales.float().repeat_interleave(GROUP_SIZE, 1)
    return pack((weight / steps).round_().clamp_(-8, 7).to(torch.int8)), scales


QUANTIZER = Quantizer(
    bits=4,
    algorithm="weighted scales",
    source="llama.cpp, importance matrices (pull request 4861)",
    quantize=in_weighted_groups,
    prepare=importance_of,
    description="scales weighted by the inputs' squares on calibration text",
)
