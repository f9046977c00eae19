"""Convert integers and scales to the layouts of ONNX Runtime's quantized operators.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md,
``com.microsoft.MatMulNBits`` and ``com.microsoft.GatherBlockQuantized``. Both take a weight as
unsigned integers in blocks with one scale each; without zero points, the integers are offset by
2^(bits - 1), which makes the weight symmetric. Of two 4-bit values in a byte, the first is in the
low half. Blocks of ``MatMulNBits`` that a row does not fill are padded with that offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from caliport.export.quantization.choices import GROUP_SIZE, row_scale_block

if TYPE_CHECKING:
    from caliport.export.quantization.choices import Form


@dataclass(frozen=True)
class Layout:
    """How one weight is stored for its operator.

    Attributes:
        rows: Outputs of a product, or rows of an embedding.
        columns: Inputs of a product, or length of an embedding's row.
        bits: 4 or 8.
        block: Number of values that share a scale.
        data_shape: Shape of the integers, uint8.
        scale_shape: Shape of the scales, float32.
    """

    rows: int
    columns: int
    bits: int
    block: int
    data_shape: tuple[int, ...]
    scale_shape: tuple[int, int]


def product_layout(rows: int, columns: int, form: Form) -> Layout:
    """The layout of ``MatMulNBits``, data [out, blocks, bytes of a block].

    The operator also quantizes its input in these blocks.
    """
    bits, block = (4, GROUP_SIZE) if form == "int4" else (8, row_scale_block(columns))
    blocks = -(-columns // block)
    return Layout(rows, columns, bits, block, (rows, blocks, block * bits // 8), (rows, blocks))


def lookup_layout(rows: int, columns: int, form: Form, tied: Layout | None = None) -> Layout:
    """The layout of ``GatherBlockQuantized``, data [rows, bytes of a row].

    Args:
        rows: Number of rows of the embedding.
        columns: Length of a row.
        form: ``rows int4`` or ``rows int8``.
        tied: The layout of a product over the same integers. If its rows are not padded, both have
            the same bytes and the same scales, and are stored once.
    """
    if form == "rows int4":
        block, bits = GROUP_SIZE, 4
    elif tied is not None and not columns % tied.block:
        block, bits = tied.block, 8
    else:
        block, bits = max(16, 1 << (columns - 1).bit_length()), 8  # a power of two from 16 on
    return Layout(
        rows, columns, bits, block, (rows, columns * bits // 8), (rows, -(-columns // block))
    )


def unsigned(data: np.ndarray, width: int) -> np.ndarray:
    """8-bit rows as both operators store them: int8 [n, columns] to uint8 [n, width]."""
    whole = np.full((len(data), width), 128, np.uint8)
    np.bitwise_xor(data.view(np.uint8), 128, out=whole[:, : data.shape[1]])
    return whole


def unpack(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Signed integers, int8 [rows, columns], from the uint8 data [rows, …] of either operator."""
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1)
    whole = packed.reshape(len(packed), -1)[:, :columns].astype(np.int16)
    return (whole - (1 << (bits - 1))).astype(np.int8)
