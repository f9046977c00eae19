"""Write a graph's weights to a file beside it, one at a time, from the files that store them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import onnx_ir as ir
import torch

from caliport.core.errors import InputError
from caliport.export.onnx.graph.layouts import unsigned

if TYPE_CHECKING:
    from caliport.export.decoder.stored import Stored, Weights

# Alignment at which any system can map a file (ONNX external data, "offset").
_ALIGNMENT = 4096
# Constants larger than this are also written beside the graph.
_LARGE = 4096
_SLICE = 1 << 24


@dataclass(frozen=True)
class _Place:
    offset: int
    length: int


def write_weights(graph: ir.Graph, weights: Weights, path: Path) -> None:
    """Turn every weight of a graph into an initializer whose content is stored in a file.

    Weights are the inputs with names in ``Weights``: ``name`` itself, and for quantized layers
    ``name.qdata`` and ``name.scale``, where ``name`` may be several names joined by ``+``, whose
    weights are concatenated. Equal contents are written once. At most a slice of a tensor is in
    memory.

    Args:
        graph: Changed in place; its other inputs stay inputs.
        weights: The weights of the whole decoder.
        path: The file to write, beside the graph.

    Raises:
        InputError: The graph uses the float weight of a layer that ships quantized.
    """
    places: dict[tuple[object, ...], _Place] = {}
    with path.open("wb") as stream:
        for value in list(graph.inputs):
            parts = _sources(value, weights)
            if parts is not None:
                graph.inputs.remove(value)
                assert value.shape is not None
                shape = tuple(int(size) for size in value.shape)  # type: ignore[arg-type]
                width = int(np.prod(shape[1:]))
                key = (value.dtype, width, *(part.path for part in parts))
                if key not in places:
                    write = partial(_write, parts=parts, dtype=value.dtype, width=width)
                    places[key] = _append(stream, write)
                _refer(value, places[key], path)
                graph.register_initializer(value)
        for value in graph.initializers.values():
            content = value.const_value
            if isinstance(content, ir.ExternalTensor) or content is None:
                continue
            if content.nbytes > _LARGE:
                _refer(value, _append(stream, partial(_dump, content=content)), path)


def _sources(value: ir.Value, weights: Weights) -> list[Stored] | None:
    """The stored tensors whose concatenation is an input's content."""
    name = str(value.name)
    if name in weights:
        return [weights[name]]
    parts, _, ending = name.rpartition(".")
    stored = {"qdata": "weight.data", "scale": "weight.scale"}.get(ending, ending)
    names = [f"{part}.{stored}" for part in parts.split("+")]
    if all(part in weights for part in names):
        return [weights[part] for part in names]
    if f"{name}.data" in weights:
        raise InputError(
            f"{name}: used outside of its layer, so it would stay unquantized; this architecture "
            "cannot be exported to onnx below fp32"
        )
    return None


def _append(stream: BinaryIO, write: Callable[[BinaryIO], object]) -> _Place:
    stream.seek(-stream.tell() % _ALIGNMENT, 1)
    offset = stream.tell()
    write(stream)
    return _Place(offset, stream.tell() - offset)


def _refer(value: ir.Value, place: _Place, path: Path) -> None:
    assert value.dtype is not None
    assert value.shape is not None
    value.const_value = ir.ExternalTensor(
        path.name,
        place.offset,
        place.length,
        value.dtype,
        shape=value.shape,
        name=str(value.name),
        base_dir=path.parent,
    )


def _dump(stream: BinaryIO, content: ir.TensorProtocol) -> None:
    stream.write(content.tobytes())


def _write(stream: BinaryIO, parts: list[Stored], dtype: ir.DataType | None, width: int) -> None:
    """Write stored tensors in the operators' layout, ``width`` values per row."""
    for part in parts:
        rows = part.tensor().view(part.shape[0] if part.shape else 1, -1)
        step = max(1, _SLICE // width)
        for start in range(0, len(rows), step):
            piece = rows[start : start + step]
            if piece.dtype == torch.int8:
                stream.write(unsigned(piece.numpy(), width).data)
            elif dtype == ir.DataType.FLOAT:  # the scale of a row goes to each of its blocks
                stream.write(piece.float().expand(-1, width).contiguous().numpy().data)
            else:
                stream.write(piece.numpy().data)
