"""The weights that an artifact holds, read back from its files as the integers and scales they are.

Sources: ``program.fbs`` of ExecuTorch 1.5.1 (segments, named data, constants) and
``com.microsoft.MatMulNBits`` and ``GatherBlockQuantized`` of ONNX Runtime's ContribOperators.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from caliport.export.onnx.layouts import unpack
from caliport.export.quantization.tensors import unpacked

if TYPE_CHECKING:
    from caliport.export.decoder.stored import Weights

_SCALE = "scale_"  # begins the key of a product's scales
_PRODUCT, _LOOKUP = "MatMulNBits", "GatherBlockQuantized"


@dataclass(frozen=True)
class Held:
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

    def equals(self, other: Held) -> bool:
        """Whether both are the same numbers, bit for bit."""
        if (self.scale is None) != (other.scale is None) or self.data.dtype != other.data.dtype:
            return False
        if self.scale is not None and other.scale is not None:
            return torch.equal(self.data, other.data) and torch.equal(self.scale, other.scale)
        return torch.equal(self.data, other.data)


def asked_for(weights: Weights, name: str) -> Held:
    """The weight of a module as ``caliport.export.decoder.shipped.shipped_decoder`` made it."""
    if f"{name}.weight" in weights:
        return Held(weights[f"{name}.weight"].tensor(), None)
    data = weights[f"{name}.weight.data"].tensor()
    data = unpacked(data) if data.dtype == torch.uint8 else data
    return Held(data, weights[f"{name}.weight.scale"].tensor().float())


def held_by_onnx(graph: Path, sizes: Mapping[str, int]) -> Iterator[tuple[str, Held]]:
    """Weights of the quantized products and lookups of a graph, and its float32 matrices.

    Args:
        graph: ``model.onnx``; its weights lie where it says.
        sizes: Outputs of each module, to take products of several apart.

    Yields:
        Module names with what they hold, for the modules that the graph names.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(graph, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in model.initializer}

    def read(name: str) -> np.ndarray:
        return np.array(numpy_helper.to_array(tensors[name], base_dir=str(graph.parent)))

    for name in tensors:
        if (module := name.removesuffix(".weight")) != name and module in sizes:
            yield module, Held(torch.from_numpy(read(name)), None)
    for node in model.node:
        if node.op_type in (_PRODUCT, _LOOKUP):
            parts = node.input[0].removesuffix(".qdata") if node.op_type == _LOOKUP else node.name
            data, scale = _numbers(node, read)
            start = 0
            for name in parts.split("+"):
                rows = slice(start, start + sizes.get(name, len(data)))
                yield name, Held(data[rows], _narrowed(scale[rows]))
                start = rows.stop


def _numbers(node: Any, read: Callable[[str], np.ndarray]) -> tuple[Tensor, Tensor]:
    """Integers [out, in] less their zero points, and scales [out, blocks]."""
    options = {attribute.name: attribute.i for attribute in node.attribute}
    given = [*node.input, "", ""]
    quantized, scales, zeros = (
        (given[0], given[2], given[3]) if node.op_type == _LOOKUP else given[1:4]
    )
    bits, block = options["bits"], options["block_size"]
    scale = torch.from_numpy(read(scales))
    packed = read(quantized).reshape(len(scale), -1)
    columns = options.get("K", packed.shape[1] * 8 // bits)
    data = torch.from_numpy(unpack(packed, bits, columns))
    if zeros:
        blocks = scale.numel() // len(scale)
        zero = torch.from_numpy(unpack(read(zeros).reshape(len(scale), -1), bits, blocks))
        data = data - zero.repeat_interleave(block, 1)[:, :columns]
    return data, scale.reshape(len(scale), -1)


def _narrowed(scale: Tensor) -> Tensor:
    """One scale a row where all blocks of every row share theirs."""
    return scale[:, :1] if bool((scale == scale[:, :1]).all()) else scale


class Program:
    """The contents of an ExecuTorch program; holds the SHA-256 of what its delegates name.

    Args:
        path: A ``.pte``.
    """

    def __init__(self, path: Path) -> None:
        from executorch.exir._serialize import _flatbuffer_program, _program

        self._bytes = np.memmap(path, np.uint8, "r")
        header = _program._get_extended_header(bytes(self._bytes[:256]))
        assert header is not None
        size, self._base = header.program_size, header.segment_base_offset
        self._program = _flatbuffer_program._flatbuffer_to_program(bytes(self._bytes[:size]))
        self._named = {
            entry.key: self._segment(entry.segment_index) for entry in self._program.named_data
        }
        self._hashes = {hashlib.sha256(data.data).digest() for data in self._named.values()}

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._hashes

    def constants(self) -> Iterator[np.ndarray]:
        """What operators outside of delegates read, each with the padding that follows it."""
        place = self._program.constant_segment
        whole = self._segment(place.segment_index)
        for start, end in zip(place.offsets, [*place.offsets[1:], len(whole)], strict=True):
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
        """What a method without instructions gives; nothing where there is no such method."""
        for plan in self._program.execution_plan:
            if plan.name == name:
                return [int(plan.values[index].val.int_val) for index in plan.outputs]
        return []

    def matrices(self) -> list[np.ndarray]:
        """Everything that delegates name."""
        return list(self._named.values())

    def _segment(self, index: int) -> np.ndarray:
        segment = self._program.segments[index]
        start = self._base + segment.offset
        return self._bytes[start : start + segment.size]
