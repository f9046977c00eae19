"""The header of a ``.gguf`` file, checked before any library reads it.

A count or a length in it may ask for terabytes, and tensors may lie over one another or beyond the
file's end. Nothing is read here but the header, once, from front to back.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from caliport.core.errors import InputError
from caliport.core.untrusted import check_regular, number, shown

SUFFIX = ".gguf"
_INSTEAD = "expected a .gguf file of a whole language model, or its safetensors directory"
_SPLIT = re.compile(r"-\d{1,9}-of-\d{1,9}$")
_VERSIONS = (2, 3)
_TENSORS, _KEYS = 65_536, 4096
_ELEMENTS = 4_000_000  # of all arrays; a vocabulary of 262,144 with merges has some 1.4 million
_NAME, _WORD, _TEXT = 512, 65_536, 2**21  # bytes of a name, a string in an array, another string
_HEADER = 256 * 2**20
_VALUES = 2**40
_ALIGNMENT = 2**20
_STRING, _ARRAY = 8, 9
_SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}


@dataclass(frozen=True)
class GgufHeader:
    """What a ``.gguf`` file says of itself.

    Attributes:
        fields: Its settings by key; of an array, only the number of its elements.
        tensors: The number of values of each tensor, by name.
    """

    fields: Mapping[str, Any]
    tensors: Mapping[str, int]

    @property
    def values(self) -> int:
        """Values of all tensors."""
        return sum(self.tensors.values())


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a ``.gguf`` file.

    Raises:
        InputError: Not a regular file or not GGUF; cut off; one part of several; an adapter, a
            projector or a vocabulary alone; counts and lengths beyond reason; tensors that overlap
            or lie beyond the end; types that are not known.
    """
    size = check_regular(path)
    if _SPLIT.search(path.stem):
        raise InputError(f"{path}: one part of a split model, {_INSTEAD}; join its parts first")
    try:
        with path.open("rb") as stream:
            reader = _Reader(stream, path, size)
            fields, tensors = _parsed(reader)
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror}); expected a file") from None
    _check_fields(fields, path)
    return GgufHeader(fields, tensors)


class _Reader:
    """Reads numbers and strings in order and never beyond the file or the limit of a header."""

    def __init__(self, stream: BinaryIO, path: Path, size: int) -> None:
        self.stream, self.path = stream, path
        self.size, self.at = size, 0
        self.elements = 0

    def take(self, count: int) -> bytes:
        if self.at + count > min(self.size, _HEADER):
            raise InputError(
                f"{self.path}: its header goes on beyond byte {min(self.size, _HEADER):,}, "
                + ("where the file ends" if self.size <= _HEADER else "the most that is read")
                + "; expected the whole file"
            )
        self.at += count
        return self.stream.read(count)

    def one(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, most: int, what: str) -> str:
        length = self.count(most, f"bytes of {what}")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: {what} is not UTF-8, expected text") from None

    def count(self, most: int, what: str, least: int = 0) -> int:
        return int(number(self.one("<Q"), f"{self.path}: {what}", least, most, whole=True))

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            found = self.one(_SCALARS[kind])
            return bool(found) if kind == 7 else found
        if kind == _STRING:
            return self.text(_TEXT, shown(key))
        if kind != _ARRAY:
            raise InputError(f"{self.path}: {shown(key)} is of type {kind}, which GGUF has not")
        inner = self.one("<I")
        count = self.count(_ELEMENTS - self.elements, f"elements of {shown(key)}")
        self.elements += count
        if inner in _SCALARS:
            self.take(count * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING:
            for _ in range(count):
                self.text(_WORD, f"a string of {shown(key)}")
        else:
            raise InputError(f"{self.path}: {shown(key)} is an array of type {inner}, not read")
        return count


def _parsed(reader: _Reader) -> tuple[dict[str, Any], dict[str, int]]:
    path = reader.path
    if reader.size < 4 or reader.take(4) != b"GGUF":
        raise InputError(f"{path}: not a GGUF file (its first bytes say so), {_INSTEAD}")
    version = reader.one("<I")
    if version not in _VERSIONS:
        what = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
        raise InputError(f"{path}: a GGUF file {what}, expected little-endian, version 2 or 3")
    count = reader.count(_TENSORS, "tensors", 1)
    fields: dict[str, Any] = {}
    for _ in range(reader.count(_KEYS, "keys", 1)):
        key = reader.text(_NAME, "a key")
        if key in fields:
            raise InputError(f"{path}: has the key {shown(key)} twice, expected it once")
        fields[key] = reader.value(reader.one("<I"), key)
    alignment = number(
        fields.get("general.alignment", 32), f"{path}: general.alignment", 1, _ALIGNMENT, whole=True
    )
    tensors: dict[str, int] = {}
    places = []
    for _ in range(count):
        name = reader.text(_NAME, "a tensor's name")
        if name in tensors:
            raise InputError(f"{path}: has the tensor {shown(name)} twice, expected it once")
        tensors[name], start, stop = _tensor(reader, name)
        places.append((start, stop, name))
    begin = math.ceil(reader.at / alignment) * int(alignment)
    _check_places(sorted(places), reader.size - begin, path)
    return fields, tensors


def _tensor(reader: _Reader, name: str) -> tuple[int, int, int]:
    """A tensor's number of values, and where its bytes begin and end in the data."""
    from gguf.constants import GGML_QUANT_SIZES

    where = f"{reader.path}: {shown(name)}"
    rank = int(number(reader.one("<I"), f"{where}: dimensions", 1, 4, whole=True))
    shape = [reader.count(_VALUES, f"{shown(name)}: a dimension", 1) for _ in range(rank)]
    kind = reader.one("<I")
    if kind not in GGML_QUANT_SIZES:
        raise InputError(f"{where} is of type {kind}, which the package gguf does not know")
    block, width = GGML_QUANT_SIZES[kind]
    values = math.prod(shape)
    if values > _VALUES or shape[0] % block:
        raise InputError(f"{where} is {shape[::-1]}, expected rows of a multiple of {block} values")
    start = reader.one("<Q")
    return values, start, start + values // block * width


def _check_places(places: list[tuple[int, int, str]], size: int, path: Path) -> None:
    before = 0
    for start, stop, name in places:
        if start < before:
            raise InputError(f"{path}: {shown(name)} overlaps another tensor, expected its own")
        if stop > size:
            raise InputError(
                f"{path}: {shown(name)} ends {stop - max(size, 0):,} bytes beyond the file; "
                "expected the whole file: fetch it again"
            )
        before = stop


def _check_fields(fields: Mapping[str, Any], path: Path) -> None:
    kind = fields.get("general.type", "model")
    if kind != "model":
        raise InputError(f"{path}: general.type is {shown(kind)}, {_INSTEAD}")
    if fields.get("split.count", 1) not in (0, 1):
        raise InputError(f"{path}: one part of a split model, {_INSTEAD}; join its parts first")
    name = fields.get("general.architecture")
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]{1,64}", name):
        raise InputError(
            f"{path}: general.architecture is {shown(name)}, expected a name such as llama"
        )
