"""Our integers and scales in the layouts of ONNX Runtime's quantized operators.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md,
``com.microsoft.MatMulNBits`` and ``com.microsoft.GatherBlockQuantized``.
"""

from __future__ import annotations

import numpy as np

_BLOCKS = (256, 128, 64, 32)


def block_size(in_features: int, groups: int) -> int:
    """How many inputs of a linear layer share a scale in ``MatMulNBits``.

    The operator also quantizes its input in these blocks. Where the weight has several groups the
    block is the group. A weight with one scale per output channel repeats it over its blocks; then
    the block is the one that stores the fewest bytes, padding and repeated scales counted, the
    largest among equals.

    Args:
        in_features: Inputs of the layer.
        groups: Scales per output channel.
    """
    if groups > 1:
        return in_features // groups
    return min(_BLOCKS, key=lambda block: -(-in_features // block) * (block + 4))


def pack(data: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Signed integers as ``MatMulNBits`` stores them: offset to unsigned, in blocks.

    The operator's default zero point is 2^(bits - 1), so the offset makes the weight symmetric.
    Blocks are padded with that zero point; of two 4-bit values in a byte the first is the low one.

    Args:
        data: int8 [out, in] with values in [-2^(bits-1), 2^(bits-1) - 1].
        bits: 4 or 8.
        block: Values per block.

    Returns:
        uint8 [out, blocks, block * bits / 8].
    """
    rows, columns = data.shape
    blocks = -(-columns // block)
    zero = 1 << (bits - 1)
    whole = np.full((rows, blocks * block), zero, np.uint8)
    whole[:, :columns] = (data.astype(np.int16) + zero).astype(np.uint8)
    whole = whole.reshape(rows, blocks, block)
    return whole if bits == 8 else whole[..., 0::2] | (whole[..., 1::2] << 4)


def unpack(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The inverse of ``pack``: int8 [out, columns]."""
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1)
    whole = packed.reshape(len(packed), -1)[:, :columns].astype(np.int16)
    return (whole - (1 << (bits - 1))).astype(np.int8)


def block_scales(scale: np.ndarray, columns: int, block: int) -> np.ndarray:
    """Scales [out, groups] for each block of ``MatMulNBits``: float32 [out, blocks]."""
    if scale.shape[1] > 1:
        return scale
    return np.repeat(scale, -(-columns // block), axis=1)


def row_block(columns: int) -> int:
    """The block of ``GatherBlockQuantized`` that holds a whole row: a power of two from 16 on."""
    return max(16, 1 << (columns - 1).bit_length())
