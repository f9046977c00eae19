"""4-bit groups by half-quadratic quantization, compiled.

Half-quadratic quantization (https://mobiusml.github.io/hqq_blog) of the scale only: round with the
scale, compute the least-squares scale for these integers, repeat at most 20 times. torchao's
``hqq_scale_only`` iterates all groups until the last one has converged; here each group stops when
it has converged, which gives the same scales in a fifth of the work.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from caliport.export.quantization.choices import GROUP_SIZE
from caliport.export.quantization.quantizers.compiled import compiled
from caliport.export.quantization.quantizers.registry import Quantizer

_STEPS = 20
_TOLERANCE = np.float32(1e-5)
_LEAST = np.finfo(np.float32).eps


def in_groups(weight: Tensor, inputs: None = None) -> tuple[Tensor, Tensor]:
    """Quantize to 4 bits in groups of 32 with bfloat16 scales; releases the GIL.

    ExecuTorch 1.5.1 stores XNNPACK's group scales as bfloat16, whatever their type. Rounding them
    here, before the integers are computed, gives eager model and artifact the same numbers.

    Args:
        weight: float32 [n, width], whole groups of 32; on any device, computed on the CPU.

    Returns:
        The integers, uint8 [n, width / 2], packed as
        ``caliport.export.quantization.tensors.unpacked`` reads them, and the positive scales,
        bfloat16 [n, width / 32].
    """
    groups = weight.detach().reshape(-1, GROUP_SIZE).contiguous().cpu().numpy()
    fitted = torch.empty(len(groups))
    _fit(groups, fitted.numpy())
    scales = fitted.bfloat16()
    data = torch.empty(len(groups), GROUP_SIZE // 2, dtype=torch.uint8)
    _pack(groups, (1 / scales.float()).numpy(), data.numpy())
    found = data.view(len(weight), -1), scales.view(len(weight), -1)
    return found[0].to(weight.device), found[1].to(weight.device)


@compiled("float32(float32[::1])", inline="always")
def _sum(values: np.ndarray) -> np.float32:
    """Sum 32 values; overwrites them."""
    for lane in range(8):
        values[lane] = (values[lane] + values[lane + 8]) + (values[lane + 16] + values[lane + 24])
    low = (values[0] + values[4]) + (values[1] + values[5])
    return low + ((values[2] + values[6]) + (values[3] + values[7]))


# Products are summed in a fixed order and never fused with their sums, so that all processors give
# the same scales. Eight sums run side by side for speed.
@compiled("void(float32[:, ::1], float32[::1])", error_model="numpy")
def _fit(groups: np.ndarray, scales: np.ndarray) -> None:
    products = np.empty(GROUP_SIZE, np.float32)
    squares = np.empty(GROUP_SIZE, np.float32)
    for row in range(len(groups)):
        largest = np.float32(0)
        for column in range(GROUP_SIZE):
            largest = max(largest, abs(groups[row, column]))
        scale = max(largest / np.float32(8), _LEAST)
        for _ in range(_STEPS):
            for column in range(GROUP_SIZE):
                whole = np.rint(groups[row, column] / scale)
                whole = min(max(whole, np.float32(-8)), np.float32(7))
                products[column] = groups[row, column] * whole
                squares[column] = whole * whole
            product, square = _sum(products), _sum(squares)
            better = max(abs(product / square), _LEAST) if square > 0 else scale
            still = abs(better - scale) <= _TOLERANCE * scale
            scale = better
            if still:
                break
        scales[row] = scale


@compiled(
    "void(float32[:, ::1], float32[::1], uint8[:, ::1])",
    error_model="numpy",
    fastmath={"nsz", "nnan"},
)
def _pack(groups: np.ndarray, inverse: np.ndarray, data: np.ndarray) -> None:
    for row in range(len(groups)):
        for column in range(GROUP_SIZE // 2):
            low = np.rint(groups[row, 2 * column] * inverse[row])
            high = np.rint(groups[row, 2 * column + 1] * inverse[row])
            low = min(max(low, np.float32(-8)), np.float32(7)) + np.float32(8)
            high = min(max(high, np.float32(-8)), np.float32(7)) + np.float32(8)
            data[row, column] = np.uint8(np.int32(low) | np.int32(high) << 4)


QUANTIZER = Quantizer(
    bits=4,
    algorithm="hqq_scale_only",
    source="https://mobiusml.github.io/hqq_blog; torchao 0.18, hqq_scale_only",
    quantize=in_groups,
    description="half-quadratic quantization; needs no text",
)
