"""4-bit group scales that minimise the rounding error weighted by the inputs' squares, compiled.

For a group of 32 weights w and weights of importance h, the scale s and the integers
q = round(w / s) minimise the sum of h·(q·s - w)². Candidates are a grid around the largest value,
then least squares for the integers found, as in half-quadratic quantization. Every candidate is
rounded to bfloat16 before it is judged, since that is what ships.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from caliport.export.quantization.choices import GROUP_SIZE
from caliport.export.quantization.quantizers.compiled import compiled

_GRID = np.linspace(0.6, 1.15, 45, dtype=np.float32)
_FITS = 4
_LEAST = np.float32(1e-8)
_LOWEST, _HIGHEST = np.float32(-8), np.float32(7)


def weighted_scales(weight: Tensor, importance: Tensor) -> Tensor:
    """Scales of each group of 32 values; releases the GIL.

    Args:
        weight: float32 [n, width], whole groups of 32.
        importance: float32 [width], not negative; the inputs' mean squares up to a factor.

    Returns:
        Positive scales, bfloat16 [n, width / 32].
    """
    rows, width = weight.shape
    found = torch.empty(rows * width // GROUP_SIZE)
    groups = weight.contiguous().view(-1, GROUP_SIZE).numpy()
    _fit(groups, importance.contiguous().view(-1, GROUP_SIZE).numpy(), _GRID, found.numpy())
    return found.view(rows, -1).bfloat16()


def pack(data: Tensor) -> Tensor:
    """Pack integers in [-8, 7], [n, width], two in a byte; the first in the low half, offset 8."""
    pairs = (data.to(torch.int16) + 8).to(torch.uint8).view(len(data), -1, 2)
    return pairs[..., 0] | pairs[..., 1] << 4


def bfloat16_of(value: np.float32) -> np.float32:
    """Round a positive float32 to the nearest bfloat16, ties to even."""
    bits = np.float32(value).view(np.int32)
    bits = (bits + np.int32(0x7FFF) + ((bits >> 16) & 1)) & np.int32(-65536)
    return np.int32(bits).view(np.float32)


_narrow = compiled("float32(float32)")(bfloat16_of)


@compiled("void(float32[:, ::1], float32[:, ::1], float32[::1], float32[::1])", error_model="numpy")
def _fit(groups: np.ndarray, importance: np.ndarray, grid: np.ndarray, scales: np.ndarray) -> None:
    for row in range(len(groups)):
        weights = importance[row % len(importance)]
        largest = np.float32(0)
        for column in range(GROUP_SIZE):
            largest = max(largest, abs(groups[row, column]))
        least, best = np.float32(np.inf), _LEAST
        for step in range(len(grid) + _FITS):
            if step < len(grid):
                scale = largest / np.float32(7.5) * grid[step]
            else:
                product, square = np.float32(0), np.float32(0)
                for column in range(GROUP_SIZE):
                    whole = np.rint(groups[row, column] / best)
                    whole = min(max(whole, _LOWEST), _HIGHEST)
                    product += groups[row, column] * whole * weights[column]
                    square += whole * whole * weights[column]
                scale = abs(product / square) if square > 0 else best
            scale = _narrow(max(scale, _LEAST))
            error = np.float32(0)
            for column in range(GROUP_SIZE):
                whole = np.rint(groups[row, column] / scale)
                whole = min(max(whole, _LOWEST), _HIGHEST)
                off = whole * scale - groups[row, column]
                error += off * off * weights[column]
            if error < least:
                least, best = error, scale
        scales[row] = best
