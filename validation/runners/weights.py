"""One weight matrix of an artifact, as the integers and scales that its files hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from caliport.export.quantization.tensors import unpacked

if TYPE_CHECKING:
    from caliport.export.decoder.shipped import ShippedDecoder
    from caliport.export.decoder.stored import Weights


@dataclass(frozen=True)
class StoredWeight:
    """One weight matrix.

    Attributes:
        data: int8 integers, or float32 values, [out, in].
        scale: float32 [out, groups]; None for float32 values.
    """

    data: Tensor
    scale: Tensor | None

    def values(self) -> Tensor:
        """float32 [out, in]."""
        if self.scale is None:
            return self.data.float()
        width, groups = self.data.shape[1], self.scale.shape[1]
        block = -(-width // groups)
        return self.data.float() * self.scale.repeat_interleave(block, 1)[:, :width]

    def equals(self, other: StoredWeight) -> bool:
        """Whether both are the same numbers, bit for bit."""
        if (self.scale is None) != (other.scale is None) or self.data.dtype != other.data.dtype:
            return False
        if self.scale is not None and other.scale is not None:
            return torch.equal(self.data, other.data) and torch.equal(self.scale, other.scale)
        return torch.equal(self.data, other.data)


def requested_weight(weights: Weights, name: str) -> StoredWeight:
    """The weight that should ship for a module, as ``shipped_decoder`` made it."""
    if f"{name}.weight" in weights:
        return StoredWeight(weights[f"{name}.weight"].tensor(), None)
    data = weights[f"{name}.weight.data"].tensor()
    data = unpacked(data) if data.dtype == torch.uint8 else data
    return StoredWeight(data, weights[f"{name}.weight.scale"].tensor().float())


def matrices_of(decoder: ShippedDecoder) -> list[str]:
    """Modules whose weight is a matrix."""
    return [
        name
        for name, module in decoder.whole.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if key == "weight" and parameter.dim() == 2
    ]


def energy_beyond(difference: Tensor, rank: int) -> float:
    """The energy of a matrix beyond what two updates of a rank, and one row, can make of it."""
    if not difference.isfinite().all():
        return math.inf
    return float(torch.linalg.svdvals(difference)[2 * rank + 1 :].square().sum())
