"""Headers of safetensors files, checked before any tensor is read."""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caliport.core.errors import InputError
from caliport.core.untrusted import check_regular, parse_json, shown

_HEADER_BYTES = 32 * 2**20
_DIMENSIONS = 8
_MOST_VALUES = 2**62
_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL"), 8),
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, by its header.

    Attributes:
        file: The file.
        dtype: Type in the file, such as ``BF16``.
        shape: Its shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def check_safetensors(path: Path) -> None:
    """Check a safetensors file's header against its size, without reading any tensor.

    Raises:
        InputError: See ``read_header``.
    """
    read_header(path)


def read_header(path: Path, root: Path | None = None) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, without reading any.

    Args:
        path: The file.
        root: The directory that it must be in after all links are resolved; None for anywhere.

    Raises:
        InputError: The file is missing, a device, outside ``root``, empty, a pickle, truncated or
            not a safetensors file.
    """
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file; expected weights as safetensors")
    size = check_regular(path, root=root)
    with path.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= size - 8:
            if head[:2] in _PICKLES:
                raise InputError(f"{path}: a pickle, expected safetensors; pickles are not read")
            raise InputError(f"{path}: {size} bytes and no complete header; the file is truncated")
        if length > _HEADER_BYTES:
            raise InputError(
                f"{path}: a header of {length:,} bytes, expected at most {_HEADER_BYTES:,}"
            )
        text = stream.read(length)
    try:
        header = parse_json(text, path)
    except InputError as error:
        raise InputError(f"{error}; its header is not JSON, expected a safetensors file") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: header is not JSON of tensors; expected a safetensors file")
    header.pop("__metadata__", None)
    found, spans = {}, []
    for name, entry in header.items():
        dtype, shape, (start, stop) = _entry(entry, f"{path}: {shown(name)}")
        found[name] = StoredTensor(path, dtype, shape)
        spans.append((start, stop, name))
        bits = _BITS.get(dtype)
        if bits is not None and (stop - start) * 8 != bits * math.prod(shape):
            raise InputError(
                f"{path}: {shown(name)} has {stop - start} bytes, {dtype} of shape {list(shape)} "
                f"has {bits * math.prod(shape) // 8}"
            )
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise InputError(
                f"{path}: {shown(name)} begins at {start}, expected {end}: each tensor after the "
                "one before"
            )
        end = stop
    if size != 8 + length + end:
        raise InputError(
            f"{path}: {size} bytes, its header asks for {8 + length + end}; the file is truncated"
        )
    return found


def _entry(entry: Any, where: str) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Type, shape and place of a tensor, from a header."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]}:
            sizes = [n for n in shape if type(n) is int and n >= 0]
            fits = len(sizes) == len(shape) <= _DIMENSIONS and math.prod(sizes) < _MOST_VALUES
            if fits and 0 <= start <= stop < _MOST_VALUES:
                return dtype, tuple(sizes), (start, stop)
    raise InputError(f"{where} is {shown(entry)}; its header is not JSON of dtype, shape, place")
