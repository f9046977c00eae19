"""The weights that an ONNX graph holds, read back from its files.

Source: ``com.microsoft.MatMulNBits`` and ``GatherBlockQuantized`` in ONNX Runtime's list of
contributed operators (ContribOperators).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from caliport.core.errors import InputError, one_line
from caliport.export.onnx.graph.layouts import unpack
from caliport.export.quantization.choices import GROUP_SIZE
from caliport.export.quantization.quantizers.scales import pack
from caliport.validation.runners.graph_files import check_graph, read_graph
from caliport.validation.runners.weights import StoredWeight, matrices_of, requested_weight

if TYPE_CHECKING:
    from caliport.export.decoder.shipped import ShippedDecoder
    from caliport.validation.runners.engine import Differing

_PRODUCT, _LOOKUP = "MatMulNBits", "GatherBlockQuantized"


def differing_weights(graph: Path, decoder: ShippedDecoder) -> Differing:
    """Matrices of a graph that are not those of ``decoder``; see ``Engine.differing_weights``."""
    names = matrices_of(decoder)
    sizes = {name: decoder.whole.get_parameter(f"{name}.weight").shape[0] for name in names}
    odd: dict[str, StoredWeight | None] = dict.fromkeys(names)
    for name, found in stored_weights(graph, sizes):
        if name in odd and found.equals(requested_weight(decoder.weights, name)):
            del odd[name]
        elif name in odd:
            odd[name] = found
    return {name: partial(odd.get, name) for name in odd}


def integers(
    graph: Path, shapes: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Integers of 4-bit linear layers by their names; see ``Engine.integers``."""
    rows = {name: shape[0] for name, shape in shapes.items()}
    for name, found in stored_weights(graph, rows):
        if name not in shapes or found.scale is None:
            continue
        count, width = shapes[name]
        groups = width // GROUP_SIZE
        scale = found.scale if found.scale.shape[1] != 1 else found.scale.expand(-1, groups)
        if found.data.shape == (count, width) and scale.shape == (count, groups):
            yield name, (pack(found.data), scale.bfloat16())


def stored_weights(graph: Path, sizes: Mapping[str, int]) -> Iterator[tuple[str, StoredWeight]]:
    """Weights of the quantized products and lookups of a graph, and its float32 matrices.

    Args:
        graph: ``model.onnx``; its weights lie where it says.
        sizes: Outputs of each module, to take products of several apart.

    Yields:
        Module names with what they hold, for the modules that the graph names.

    Raises:
        InputError: A graph that cannot be read, or a weight whose numbers are not all there.
    """
    from onnx import numpy_helper

    check_graph(graph)
    model = read_graph(graph).graph
    tensors = {tensor.name: tensor for tensor in model.initializer}

    def read(name: str) -> np.ndarray:
        try:
            return np.array(numpy_helper.to_array(tensors[name], base_dir=str(graph.parent)))
        except Exception as error:
            raise InputError(f"{graph}: {name} cannot be read ({one_line(error)})") from error

    for name in tensors:
        if (module := name.removesuffix(".weight")) != name and module in sizes:
            yield module, StoredWeight(torch.from_numpy(read(name)), None)
    for node in model.node:
        if node.op_type in (_PRODUCT, _LOOKUP):
            parts = node.input[0].removesuffix(".qdata") if node.op_type == _LOOKUP else node.name
            try:
                data, scale = _numbers(node, read)
            except (KeyError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"{graph}: {one_line(node.name)} is no {node.op_type} ({one_line(error)})"
                ) from error
            start = 0
            for name in parts.split("+"):
                rows = slice(start, start + sizes.get(name, len(data)))
                yield name, StoredWeight(data[rows], _narrowed(scale[rows]))
                start = rows.stop


def _numbers(node: Any, read: Callable[[str], np.ndarray]) -> tuple[Tensor, Tensor]:
    """Integers [out, in] less their zero points, and scales [out, blocks]."""
    options = {attribute.name: attribute.i for attribute in node.attribute}
    given = [*node.input, "", ""]
    quantized, scales, zeros = (
        (given[0], given[2], given[3]) if node.op_type == _LOOKUP else given[1:4]
    )
    bits, block = options["bits"], options["block_size"]
    if bits not in (4, 8):
        raise ValueError(f"{bits} bits")
    scale = torch.from_numpy(read(scales))
    packed = read(quantized).reshape(len(scale), -1)
    columns = options.get("K", packed.shape[1] * 8 // bits)
    if not 0 < columns <= packed.shape[1] * 8 // bits or not 0 < block <= 2 * columns + 32:
        raise ValueError(f"{columns} columns in blocks of {block}")
    data = torch.from_numpy(unpack(packed, bits, columns))
    if zeros:
        blocks = scale.numel() // len(scale)
        zero = torch.from_numpy(unpack(read(zeros).reshape(len(scale), -1), bits, blocks))
        data = data - zero.repeat_interleave(block, 1)[:, :columns]
    return data, scale.reshape(len(scale), -1)


def _narrowed(scale: Tensor) -> Tensor:
    """One scale a row where all blocks of every row share theirs."""
    return scale[:, :1] if bool((scale == scale[:, :1]).all()) else scale
