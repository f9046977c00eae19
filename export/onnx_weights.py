"""Put our integers in the place of a traced graph's float weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
from torch import nn
from transformers import PreTrainedModel

from caliport_core.errors import InputError
from export.matmul_nbits import block_scales, block_size, pack, row_block
from export.quantize import quantized_weight

_DOMAIN = "com.microsoft"
# The level that lets MatMulNBits multiply in 8-bit integers; without it, it multiplies in float32.
_INT8_ACTIVATIONS = 4


@dataclass(frozen=True)
class _Layer:
    """A layer of the traced model: its float weight as in the graph, integers and scales."""

    name: str
    weight: np.ndarray
    data: np.ndarray
    scale: np.ndarray


def swap_weights(
    graph: onnx_ir.Graph, traced: PreTrainedModel, quantized: PreTrainedModel, bits: int
) -> dict[str, int]:
    """Replace every matrix product and embedding by ONNX Runtime's quantized operators, in place.

    The exporter renames, transposes and joins weights (query, key and value become one product), so
    weights are found by their content: every column of a product must belong to a linear layer and
    every linear layer to a product.

    Args:
        graph: Traced from ``traced``.
        traced: The model with float weights that are exactly integer times scale.
        quantized: The same model as ``export.quantize.quantize`` left it.
        bits: Of the linear weights, 4 or 8. Embeddings have 8.

    Returns:
        Number of linear layers and embeddings found.

    Raises:
        InputError: A linear layer or embedding is not in the graph, or a product's weight is no
            layer's. Nothing is ever left unquantized in silence.
    """
    linears = _layers(traced, quantized, nn.Linear)
    embeddings = _layers(traced, quantized, nn.Embedding)
    found: set[str] = set()
    for node in list(graph):
        if node.op_type in ("MatMul", "FusedMatMul", "Gemm") and _weight(node, 1) is not None:
            parts = _split(node, linears, found)
            found.update(part.name for part in parts)
            _replace(graph, node, _product(node, parts, bits))
        elif node.op_type == "Gather" and (table := _weight(node, 0)) is not None:
            layer = _find(table, embeddings, found)
            if layer is not None:
                found.add(layer.name)
                _replace(graph, node, [_gather(node, layer)])
    lost = [layer.name for layer in (*linears, *embeddings) if layer.name not in found]
    if lost:
        raise InputError(
            f"{lost[0]}: not found in the traced graph, so it would stay unquantized "
            f"({len(lost)} such layers); this architecture cannot be exported to onnx below fp32"
        )
    _drop_unused(graph)
    return {"linears_quantized": len(linears), "embeddings_quantized": len(embeddings)}


def _layers(traced: PreTrainedModel, quantized: PreTrainedModel, kind: type) -> list[_Layer]:
    layers = []
    for name, module in traced.named_modules():
        if isinstance(module, kind):
            data, scale = quantized_weight(quantized.get_submodule(name))  # type: ignore[arg-type]
            weight = module.weight.detach().numpy()  # type: ignore[attr-defined]
            layers.append(_Layer(name, weight, data.numpy(), scale.numpy()))
    return layers


def _weight(node: onnx_ir.Node, index: int) -> np.ndarray | None:
    """The constant matrix at an input, or None if there is something else."""
    value = node.inputs[index]
    if value is None or value.const_value is None or len(value.const_value.shape) != 2:
        return None
    return value.const_value.numpy()


def _split(node: onnx_ir.Node, layers: list[_Layer], found: set[str]) -> list[_Layer]:
    """The linear layers whose outputs, side by side, are those of a product."""
    weight = _weight(node, 1)
    assert weight is not None
    attributes = _attributes(node)
    odd = [name for name in ("transA", "transBatchA", "transBatchB") if attributes.get(name)]
    if odd or attributes.get("beta", 1.0) != 1.0:
        raise InputError(
            f"{node.op_type} {node.name}: not a plain linear layer; cannot quantize it"
        )
    rows = weight if attributes.get("transB") else weight.T
    parts: list[_Layer] = []
    start = 0
    while start < len(rows):
        layer = _find(rows[start:], layers, found | {part.name for part in parts})
        if layer is None:
            raise InputError(
                f"{node.op_type} {node.name}: the weight {weight.shape} of this product is that of "
                f"no linear layer (from output {start}); cannot quantize it"
            )
        parts.append(layer)
        start += len(layer.weight)
    return parts


def _find(rows: np.ndarray, layers: list[_Layer], found: set[str]) -> _Layer | None:
    """The layer whose weight begins ``rows``; of equal ones, the first that is not found yet."""
    fits = [
        layer
        for layer in layers
        if layer.weight.shape[1] == rows.shape[1]
        and len(layer.weight) <= len(rows)
        and np.array_equal(layer.weight[0], rows[0])
        and np.array_equal(layer.weight, rows[: len(layer.weight)])
    ]
    return next((layer for layer in fits if layer.name not in found), fits[0] if fits else None)


def _attributes(node: onnx_ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _product(node: onnx_ir.Node, parts: list[_Layer], bits: int) -> list[onnx_ir.Node]:
    """The quantized product, then the factor and the bias that the exporter fused into it."""
    nodes = [_matmul(node, parts, bits)]
    factor = _attributes(node).get("alpha", 1.0)
    if factor != 1.0:
        value = _initializer(f"{nodes[0].name}.factor", np.array(factor, np.float32))
        nodes.append(onnx_ir.node("Mul", [nodes[-1].outputs[0], value]))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        nodes.append(onnx_ir.node("Add", [nodes[-1].outputs[0], node.inputs[2]]))
    return nodes


def _matmul(node: onnx_ir.Node, parts: list[_Layer], bits: int) -> onnx_ir.Node:
    """``MatMulNBits`` over the joined outputs of ``parts``."""
    data = np.concatenate([part.data for part in parts])
    scale = np.concatenate([part.scale for part in parts])
    outputs, inputs = data.shape
    block = block_size(inputs, scale.shape[1])
    name = "+".join(part.name for part in parts)
    return onnx_ir.node(
        "MatMulNBits",
        [
            node.inputs[0],
            _initializer(f"{name}.qdata", pack(data, bits, block)),
            _initializer(f"{name}.scale", block_scales(scale, inputs, block)),
        ],
        {
            "K": inputs,
            "N": outputs,
            "bits": bits,
            "block_size": block,
            "accuracy_level": _INT8_ACTIVATIONS,
        },
        domain=_DOMAIN,
        name=name,
    )


def _gather(node: onnx_ir.Node, layer: _Layer) -> onnx_ir.Node:
    """``GatherBlockQuantized`` with one scale per row."""
    columns = layer.data.shape[1]
    return onnx_ir.node(
        "GatherBlockQuantized",
        [
            _initializer(f"{layer.name}.qdata", pack(layer.data, 8, columns)[:, 0]),
            node.inputs[1],
            _initializer(f"{layer.name}.scale", layer.scale),
        ],
        {"bits": 8, "block_size": row_block(columns), "gather_axis": 0, "quantize_axis": 1},
        domain=_DOMAIN,
        name=layer.name,
    )


def _initializer(name: str, array: np.ndarray) -> onnx_ir.Value:
    tensor = onnx_ir.tensor(np.ascontiguousarray(array), name=name)
    return onnx_ir.Value(
        name=name,
        shape=onnx_ir.Shape(array.shape),
        type=onnx_ir.TensorType(tensor.dtype),
        const_value=tensor,
    )


def _replace(graph: onnx_ir.Graph, old: onnx_ir.Node, new: list[onnx_ir.Node]) -> None:
    for value in (value for node in new for value in node.inputs):
        if value is None or value.const_value is None or value.name in graph.initializers:
            continue
        graph.register_initializer(value)
    before, after = old.outputs[0], new[-1].outputs[0]
    after.shape, after.type = before.shape, before.type
    graph.insert_before(old, new)
    onnx_ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    after.name = before.name


def _drop_unused(graph: onnx_ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
