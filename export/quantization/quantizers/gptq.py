"""4-bit groups by GPTQ: each rounding error is made up for by the weights not yet rounded.

GPTQ (https://arxiv.org/abs/2210.17323) minimises the error of a layer's outputs,
tr((Q - W) H (Q - W)ᵀ) with H the sum of x·xᵀ over the inputs. The scales are fixed beforehand
(``scales.weighted_scales``), so columns can be rounded in any order without a change to the stored
form: those with the largest inputs come first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from caliport.export.quantization.choices import GROUP_SIZE
from caliport.export.quantization.quantizers.compiled import compiled
from caliport.export.quantization.quantizers.registry import Quantizer
from caliport.export.quantization.quantizers.scales import pack, weighted_scales
from caliport.export.quantization.quantizers.weighted import importance_of

_DAMPING = 0.01
_BLOCK = 32


@dataclass(frozen=True)
class Prepared:
    """What all matrices with the same inputs share.

    Attributes:
        importance: The inputs' squares, float32 [width].
        order: The order in which columns are rounded, int64 [width].
        factor: Upper Cholesky factor of the inverse of the ordered, damped moments, float32
            [width, width].
    """

    importance: Tensor
    order: Tensor
    factor: Tensor


def prepare(moments: Tensor) -> Prepared:
    """Factorize the moments of a layer's inputs, float32 [width, width]."""
    importance = importance_of(moments)
    order = torch.argsort(importance, descending=True, stable=True)
    ordered = moments[order][:, order]
    ordered.diagonal().add_(_DAMPING * importance.mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(ordered))
    return Prepared(importance, order, torch.linalg.cholesky(inverse, upper=True))


def by_error_feedback(weight: Tensor, inputs: Prepared) -> tuple[Tensor, Tensor]:
    """Round column by column, and spread each error over the columns that follow.

    Args:
        weight: float32 [n, width], whole groups of 32.
        inputs: Of the layer.

    Returns:
        Packed integers, uint8 [n, width / 2], and scales, bfloat16 [n, width / 32].
    """
    scales = weighted_scales(weight, inputs.importance)
    left = weight[:, inputs.order].contiguous()
    steps = scales.float().repeat_interleave(GROUP_SIZE, 1)[:, inputs.order].contiguous()
    integers = torch.empty_like(left)
    errors = torch.empty(len(left), _BLOCK)
    for start in range(0, left.shape[1], _BLOCK):
        stop = start + _BLOCK
        block = inputs.factor[start:stop, start:stop].contiguous()
        _round_block(
            left.numpy(), steps.numpy(), block.numpy(), start, integers.numpy(), errors.numpy()
        )
        left[:, stop:].addmm_(errors, inputs.factor[start:stop, stop:], alpha=-1)
    placed = torch.empty_like(integers, dtype=torch.int8)
    placed[:, inputs.order] = integers.to(torch.int8)
    return pack(placed), scales


@compiled(
    "void(float32[:, ::1], float32[:, ::1], float32[:, ::1], int64, float32[:, ::1],"
    " float32[:, ::1])",
    error_model="numpy",
)
def _round_block(
    left: np.ndarray,
    steps: np.ndarray,
    factor: np.ndarray,
    start: int,
    integers: np.ndarray,
    errors: np.ndarray,
) -> None:
    for row in range(len(left)):
        for column in range(_BLOCK):
            at = start + column
            whole = np.rint(left[row, at] / steps[row, at])
            whole = min(max(whole, np.float32(-8)), np.float32(7))
            integers[row, at] = whole
            error = (left[row, at] - whole * steps[row, at]) / factor[column, column]
            errors[row, column] = error
            for later in range(column + 1, _BLOCK):
                left[row, start + later] -= error * factor[column, later]


QUANTIZER = Quantizer(
    bits=4,
    algorithm="gptq",
    source="https://arxiv.org/abs/2210.17323, with static groups by weighted scales",
    quantize=by_error_feedback,
    prepare=prepare,
    description="error feedback by the inputs' moments on calibration text",
)
