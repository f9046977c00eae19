"""Fuse nodes of a traced graph into the operators that ONNX Runtime has kernels for."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from caliport.export.onnx.graph.operators import OURS

_CONTRIB = "com.microsoft"
_NORM = "SimplifiedLayerNormalization"
# Operators that process each token independently, in the way a decoder uses them.
_PER_TOKEN = frozenset(
    [
        "MatMulNBits",
        "FusedMatMul",
        "MatMul",
        "Add",
        "Mul",
        "Sub",
        "Div",
        "Sigmoid",
        "Tanh",
        "Gelu",
        "FastGelu",
        "QuickGelu",
        "Relu",
        "Erf",
        "Split",
        "LayerNormalization",
        "SimplifiedLayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "Swish",
        "Softplus",
        "Pow",
        "Sqrt",
        "Reciprocal",
    ]
)


def fuse_inside_layers(graph: ir.Graph, *, join: bool) -> None:
    """Fuse nodes within a layer; call before the layers are repeated.

    Args:
        graph: Changed in place.
        join: Join the products for query, key and value into one.
    """
    for node in list(graph):
        if node.op_type == "Reshape":
            _drop_reshapes(graph, node)
    _sweep(graph)
    for node in list(graph):
        if join and node.op_type == "GroupQueryAttention":
            _pack(graph, node)
    _sweep(graph)


def fuse_between_layers(graph: ir.Graph) -> None:
    """Fuse nodes across layers; call after the layers are repeated."""
    for node in list(graph):
        if (node.domain, node.op_type) == (OURS, _NORM):
            _join_sum(graph, node)
    graph.sort()
    _last_token_first(graph)
    for node in graph:
        if node.domain == OURS:
            node.domain = ""
    _sweep(graph)
    graph.sort()


def _sweep(graph: ir.Graph) -> None:
    """Remove nodes that nothing uses."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value.uses() or value in outputs for value in node.outputs):
            graph.remove(node, safe=True)


def _replace(old: ir.Value, new: ir.Value) -> None:
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    return a.shape is not None and a.shape == b.shape


def _drop_reshapes(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a chain of reshapes that ends in the shape it began with."""
    source = node.inputs[0]
    while source is not None:
        if _same_shape(source, node.outputs[0]):
            _replace(node.outputs[0], source)
            return
        before = source.producer()
        if before is None or before.op_type != "Reshape":
            return
        source = before.inputs[0]


def _pack(graph: ir.Graph, node: ir.Node) -> None:
    """Join the quantized products for attention's query, key and value into one."""
    products = [value.producer() for value in node.inputs[:3] if value is not None]
    joined = [p for p in products if p is not None and p.op_type == "MatMulNBits"]
    if len(joined) != 3 or any(len(p.outputs[0].uses()) > 1 for p in joined):
        return
    if len({_kind(p) for p in joined}) > 1:
        return
    node.replace_input_with(0, _joined(graph, joined))
    node.replace_input_with(1, None)
    node.replace_input_with(2, None)


def _kind(product: ir.Node) -> tuple[Any, ...]:
    """What products must have in common to be joined."""
    attributes = [product.attributes[key].value for key in ("K", "bits", "block_size")]
    return (product.inputs[0], len(product.inputs), *attributes)


def _joined(graph: ir.Graph, products: list[ir.Node]) -> ir.Value:
    """Add one product with the concatenated weights of several; return its output."""
    name = "+".join(str(product.name) for product in products)
    size = sum(product.attributes["N"].as_int() for product in products)
    first = products[0]
    inputs: list[ir.Value | None] = [first.inputs[0]]
    for like in first.inputs[1:]:
        value = None
        if like is not None:
            assert like.shape is not None
            ending = str(like.name).rpartition(".")[2]
            shape = ir.Shape([size, *like.shape[1:]])
            value = ir.Value(name=f"{name}.{ending}", shape=shape, type=like.type)
            graph.inputs.append(value)
        inputs.append(value)
    attributes = [a for a in first.attributes.values() if a.name != "N"]
    new = ir.Node(
        _CONTRIB, "MatMulNBits", inputs, [*attributes, ir.AttrInt64("N", size)], name=name
    )
    out, like = new.outputs[0], first.outputs[0]
    assert like.shape is not None
    out.name, out.type, out.shape = f"{name}.out", like.type, ir.Shape([*like.shape[:-1], size])
    graph.insert_before(first, new)
    return out


def _join_sum(graph: ir.Graph, node: ir.Node) -> None:
    """Fuse a sum and its norm into one node with two outputs."""
    total = node.inputs[0]
    assert total is not None
    add = total.producer()
    if add is None or add.op_type != "Add" or total.shape is None or len(total.shape) != 3:
        return
    left, right = add.inputs
    if (
        left is None
        or right is None
        or not (_same_shape(left, total) and _same_shape(right, total))
    ):
        return
    new = ir.Node(
        _CONTRIB,
        f"Skip{_NORM}",
        [left, right, node.inputs[1]],
        [node.attributes["epsilon"]],
        num_outputs=4,
        name=node.name,
    )
    for value, old in ((new.outputs[0], node.outputs[0]), (new.outputs[3], total)):
        value.name, value.shape, value.type = old.name, old.shape, old.type
    for value in new.outputs[1:3]:
        value.name = ""
    graph.insert_before(node, new)
    _replace(node.outputs[0], new.outputs[0])
    _replace(total, new.outputs[3])
    graph.remove(node, safe=True)
    graph.remove(add, safe=True)


def _last_token_first(graph: ir.Graph) -> None:
    """Take the last token before the last layer's products, not only before the head.

    Nothing after the last attention mixes tokens, and only the last token's logits are returned.
    """
    cut = next((n for n in graph if n.op_type == "Slice" and _is_last_token(n)), None)
    if cut is None:
        return
    source = cut.inputs[0]
    assert source is not None
    assert source.shape is not None
    size, outputs = source.shape[1], set(graph.outputs)

    def of_tokens(value: ir.Value | None) -> bool:
        shape = None if value is None else value.shape
        return shape is not None and len(shape) == 3 and shape[1] == size

    after: dict[ir.Node, None] = {}
    for node in reversed(list(graph)):
        if not _is_per_token(node):
            continue
        made = [value for value in node.outputs if value.uses() or value in outputs]
        if made and all(
            value not in outputs
            and of_tokens(value)
            and all(user is cut or user in after for user, _ in value.uses())
            for value in made
        ):
            after[node] = None
    if not after:
        return
    short: dict[ir.Value, ir.Value] = {}
    for node in after:
        for index, value in enumerate(node.inputs):
            if value is None or not of_tokens(value) or value.producer() in after:
                continue
            if value not in short:
                new = ir.Node("", "Slice", [value, *cut.inputs[1:]], name=f"{value.name}.last")
                new.outputs[0].name, new.outputs[0].type = f"{value.name}.last", value.type
                new.outputs[0].shape = _of_one(value)
                graph.insert_after(value.producer() or cut, new)
                short[value] = new.outputs[0]
            node.replace_input_with(index, short[value])
    for node in after:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = _of_one(value)
    _replace(cut.outputs[0], source)


def _is_per_token(node: ir.Node) -> bool:
    if node.op_type == "Split":
        return "axis" in node.attributes and node.attributes["axis"].as_int() in (-1, 2)
    return node.op_type in _PER_TOKEN


def _of_one(value: ir.Value) -> ir.Shape:
    assert value.shape is not None
    return ir.Shape([value.shape[0], 1, *value.shape[2:]])


def _is_last_token(node: ir.Node) -> bool:
    """Whether a slice is x[:, -1:]."""
    constants = [v.const_value for v in node.inputs[1:] if v is not None]
    if len(constants) < 3 or any(constant is None for constant in constants):
        return False
    start, end, axis = (int(c.numpy().reshape(-1)[0]) for c in constants[:3] if c is not None)
    return start == -1 and end >= 1 << 31 and axis == 1
