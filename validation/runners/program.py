"""The contents of an ExecuTorch program, and the weights that it holds, read back from its file.

Source: ``program.fbs`` of ExecuTorch 1.5.1 (segments, named data, constants).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from caliport.core.errors import InputError, one_line
from caliport.core.untrusted import check_regular, number
from caliport.export.quantization.choices import GROUP_SIZE
from caliport.export.quantization.tensors import unpacked
from caliport.validation.runners.weights import (
    StoredWeight,
    energy_beyond,
    matrices_of,
    requested_weight,
)

if TYPE_CHECKING:
    from caliport.export.decoder.shipped import ShippedDecoder
    from caliport.validation.runners.engine import Differing

_SCALE = "scale_"  # begins the key of a product's scales
_NEAREST = 8  # stored matrices that are compared beyond an adapter's rank


def differing_weights(path: Path, decoder: ShippedDecoder, ranks: Mapping[str, int]) -> Differing:
    """Matrices of a program that are not those of ``decoder``; see ``Engine.differing_weights``.

    They are looked up by hash, since programs do not name their weights.
    """
    program = Program(path)
    weights, odd = decoder.weights, dict[str, Callable[[], StoredWeight | None]]()
    tables = list(program.constants())
    for name in matrices_of(decoder):
        plain, data, scale = (f"{name}.weight{part}" for part in ("", ".data", ".scale"))
        keys = [plain] if plain in weights else [data, scale]
        if not all(
            weights[key].sha256 in program or _is_table(tables, weights[key].tensor())
            for key in keys
        ):
            stored, wanted = weights[keys[0]].tensor(), requested_weight(weights, name)
            odd[name] = partial(_likeliest, program, stored, wanted, ranks.get(name, 0))
    return odd


def integers(
    path: Path, digits: Mapping[str, Sequence[str]], shapes: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Integers of 4-bit linear layers by their hashes; see ``Engine.integers``."""
    program = Program(path)
    for name, (rows, width) in shapes.items():
        data, scale = (program.find(each) for each in digits[name])
        if data is None or scale is None:
            continue
        if len(data) == rows * width // 2 and len(scale) == 2 * rows * width // GROUP_SIZE:
            yield (
                name,
                (
                    torch.from_numpy(data.copy()).view(rows, -1),
                    torch.from_numpy(scale.copy()).view(torch.bfloat16).view(rows, -1),
                ),
            )


def _is_table(tables: Iterable[np.ndarray], wanted: Tensor) -> bool:
    """Whether some constant is these numbers; lookups read scales as float32."""
    wanted = wanted.float() if wanted.dtype == torch.bfloat16 else wanted
    content = wanted.contiguous().view(-1).view(torch.uint8).numpy()
    return any(
        len(table) >= len(content) and np.array_equal(table[: len(content)], content)
        for table in tables
    )


def _likeliest(
    program: Program, stored: Tensor, wanted: StoredWeight, rank: int
) -> StoredWeight | None:
    """The stored matrix of equal size that is nearest to the wanted one, but for an adapter."""
    values = wanted.values()
    near = sorted(
        _alike(program, stored, wanted), key=lambda found: float((found.values() - values).norm())
    )[:_NEAREST]
    if not rank:
        return near[0] if near else None
    return min(near, key=lambda found: energy_beyond(found.values() - values, rank), default=None)


def _alike(program: Program, stored: Tensor, wanted: StoredWeight) -> Iterator[StoredWeight]:
    rows, count = wanted.data.shape[0], stored.numel()
    if wanted.scale is None:
        for data in program.matrices():
            if len(data) == 4 * count:
                values = torch.from_numpy(data.view(np.float32).copy())
                yield StoredWeight(values.view(rows, -1), None)
        return
    packed = stored.dtype == torch.uint8
    for data, scale in program.pairs():
        if len(scale) % 4:
            continue
        scales = torch.from_numpy(scale.copy())
        scales = scales.view(torch.bfloat16 if packed else torch.float32).float()
        if len(data) == count and not scales.numel() % rows:
            whole = torch.from_numpy(data.copy()).view(rows, -1)
            integers = unpacked(whole) if packed else whole.view(torch.int8)
            yield StoredWeight(integers, scales.view(rows, -1))


class Program:
    """The contents of an ExecuTorch program; holds the SHA-256 of what its delegates name.

    Args:
        path: A ``.pte``.

    Raises:
        InputError: Not one, or a segment that it names lies beyond the file; methods likewise.
    """

    def __init__(self, path: Path) -> None:
        from executorch.exir._serialize import _flatbuffer_program, _program

        self._path = path
        if not check_regular(path):
            raise InputError(f"{path}: empty; expected an ExecuTorch program")
        self._bytes = np.memmap(path, np.uint8, "r")
        header = _program._get_extended_header(bytes(self._bytes[:256]))
        if header is None:
            raise InputError(f"{path}: no header; expected an ExecuTorch program with segments")
        size, self._base = header.program_size, header.segment_base_offset
        try:
            self._program = _flatbuffer_program._flatbuffer_to_program(bytes(self._bytes[:size]))
        except Exception as error:
            raise InputError(f"{path}: not an ExecuTorch program ({one_line(error)})") from error
        if not _is_whole(self._program):
            raise InputError(f"{path}: lacks a list or a segment; expected an ExecuTorch program")
        self._named = {
            entry.key: self._segment(entry.segment_index) for entry in self._program.named_data
        }
        self._by_hash = {hashlib.sha256(d.data).hexdigest(): d for d in self._named.values()}

    def __contains__(self, digest: bytes) -> bool:
        return digest.hex() in self._by_hash

    def find(self, digits: str) -> np.ndarray | None:
        """What delegates name whose SHA-256 begins with these digits."""
        return next((d for h, d in self._by_hash.items() if h.startswith(digits)), None)

    def constants(self) -> Iterator[np.ndarray]:
        """What operators outside of delegates read, each with the padding that follows it."""
        place = self._program.constant_segment
        whole = self._segment(place.segment_index)
        ends = [*place.offsets[1:], len(whole)]
        for start, end in zip(place.offsets, ends, strict=False):
            yield whole[start:end]

    def pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Integers and scales as delegates name them side by side, in either order."""
        keys = re.compile(b"|".join(re.escape(key.encode()) for key in sorted(self._named)[::-1]))
        found = []
        for plan in self._program.execution_plan:
            for delegate in plan.delegates:
                text = bytes(self._segment(delegate.processed.index))
                for pair in pairwise(match[0].decode() for match in keys.finditer(text)):
                    scales = [key for key in pair if key.startswith(_SCALE)]
                    others = [key for key in pair if not key.startswith(_SCALE)]
                    if len(scales) == len(others):
                        found.append((self._named[others[0]], self._named[scales[0]]))
        return found

    def constant_method(self, name: str) -> list[int]:
        """What a method without instructions gives, true as 1; nothing without such a method."""
        for plan in self._program.execution_plan:
            if plan.name == name:
                values = [plan.values[index].val for index in plan.outputs if _within(index, plan)]
                found = [getattr(v, "bool_val", getattr(v, "int_val", None)) for v in values]
                where = f"{self._path}: {name}"
                whole = [int(each) if isinstance(each, bool) else each for each in found]
                return [int(number(each, where, 0, 2**31 - 1, whole=True)) for each in whole]
        return []

    def matrices(self) -> list[np.ndarray]:
        """Everything that delegates name."""
        return list(self._named.values())

    def _segment(self, index: int) -> np.ndarray:
        segments = self._program.segments
        segment = segments[index] if 0 <= index < len(segments) else None
        start = self._base + (segment.offset if segment else 0)
        if segment is None or start + segment.size > len(self._bytes):
            raise InputError(f"{self._path}: segment {index} lies beyond the file; it was cut")
        return self._bytes[start : start + segment.size]


def _is_whole(program: Any) -> bool:
    """Whether all that is read here is there; a flatbuffer may leave out any field."""
    lists = [program.named_data, program.segments, program.execution_plan]
    for plan in program.execution_plan or ():
        lists += [plan.values, plan.outputs, plan.delegates]
        if not all(delegate.processed for delegate in plan.delegates or ()):
            return False
    place = program.constant_segment
    if not all(isinstance(entry.key, str) for entry in program.named_data or ()):
        return False
    return place is not None and all(isinstance(each, list) for each in (*lists, place.offsets))


def _within(index: int, plan: Any) -> bool:
    return 0 <= index < len(plan.values)
