"""XXX."""

from __future__ import annotations

import torch
from torch import Tensor


def _by_row(weight: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit rows as torchao quantizes them symmetrically."""
    scale = (weight.abs().amax(1, keepdim=True) / 127.5).clamp_min_(torch.finfo(torch.float32).eps)
    return (weight * (1 / scale)).round_().clamp_(-128, 127).to(torch.int8), scale
