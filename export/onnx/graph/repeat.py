"""Repeat the traced layers of a skeleton to get the graph of the whole decoder.

The graph of a skeleton consists of the part before the first layer, the layers between their marks
(``operators.mark``) and the part after the last. A layer's nodes are copied
for every layer that it represents, with that layer's weights and caches. The marks are removed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from caliport.export.decoder.skeleton import CannotRepeat
from caliport.export.onnx.graph.operators import MARK, OURS
from caliport.export.onnx.graph.trace import LOGITS, MASK, POSITIONS, TOKENS

if TYPE_CHECKING:
    from caliport.export.decoder.skeleton import Layers

# The default names that onnxruntime_genai and optimum look for.
PAST = ("past_key_values.%d.key", "past_key_values.%d.value")
PRESENT = ("present.%d.key", "present.%d.value")

_Env = dict[ir.Value, ir.Value]


def repeat(skeleton: ir.Model, layers: Layers) -> ir.Model:
    """Make the graph of the whole decoder, with weights as the last inputs.

    The other inputs are ``input_ids``, ``attention_mask``, ``position_ids`` and the caches
    ``PAST``; outputs are ``logits`` and the caches ``PRESENT``.

    Args:
        skeleton: The result of ``caliport.export.onnx.graph.trace.trace``.
        layers: Which of its layers represents which layers.

    Raises:
        CannotRepeat: A layer uses a value computed in another layer, other than the first.
    """
    return _Repeater(skeleton, layers).run()


def layer_name(layers: Layers, name: str, layer: int) -> str:
    """The name in the whole decoder of one or several (joined) parts of a skeleton's layer."""
    return "+".join(layers.full_name(part, layer) for part in name.split("+"))


class _Repeater:
    def __init__(self, skeleton: ir.Model, layers: Layers) -> None:
        self.skeleton, self.layers = skeleton, layers
        self.old = skeleton.graph
        self.whole = layers.kept == list(range(len(layers.stands_for)))
        self.nodes: list[ir.Node] = []
        self.weights: dict[str, ir.Value] = {}
        self.constants: dict[str, ir.Value] = {}
        tokens, mask, _, *rest = self.old.inputs
        self.sizes = {str(_dim(tokens, 1)): "tokens", str(_dim(mask, 1)): "total"}
        caches = 2 * len(layers.kept)
        self.caches, self.rest = rest[:caches], rest[caches:]
        self.sizes[str(_dim(self.caches[0], 2))] = "past"

    def run(self) -> ir.Model:
        names = (TOKENS, MASK, POSITIONS)
        inputs = [self._like(v, n) for v, n in zip(self.old.inputs, names, strict=False)]
        shared: _Env = dict(zip(self.old.inputs, inputs, strict=False))
        outputs = self._as_it_is(shared) if self.whole else self._layers(shared)
        inputs += self.past
        for value, name in zip(
            outputs,
            [LOGITS, *(n % i for i in range(len(self.layers.stands_for)) for n in PRESENT)],
            strict=True,
        ):
            value.name = name
        graph = ir.Graph(
            [*inputs, *self.weights.values()],
            outputs,
            nodes=self.nodes,
            initializers=list(self.constants.values()),
            opset_imports={**self.old.opset_imports, "com.microsoft": 1},
            name="decoder",
        )
        graph.opset_imports.pop(OURS, None)
        return ir.Model(graph, ir_version=self.skeleton.ir_version, producer_name=OURS)

    def _layers(self, shared: _Env) -> list[ir.Value]:
        """Copy every layer; return the new outputs."""
        units = _units(self.old, self.layers)
        marks = {n.attributes["layer"].as_int(): n for n in self.old if _is_mark(n)}
        self.past: list[ir.Value] = []
        self._copy([n for n in self.old if units[n] < 0], shared, -1)
        hidden = shared[_input(marks[0])]
        present: list[ir.Value] = []
        for layer, kept in enumerate(self.layers.stands_for):
            env = {**shared, marks[kept].outputs[0]: hidden}
            for old, name in zip(self.caches[2 * kept : 2 * kept + 2], PAST, strict=True):
                env[old] = self._like(old, name % layer)
                self.past.append(env[old])
            self._copy([n for n in self.old if units[n] == kept], env, layer)
            hidden = env[_input(marks[kept + 1])]
            present += [env[v] for v in self.old.outputs[1 + 2 * kept : 3 + 2 * kept]]
            if layer == 0:  # values that it computes for all layers
                shared.update({v: new for v, new in env.items() if _unit(v, units) == 0})
        last = len(self.layers.kept)
        tail = {**shared, marks[last].outputs[0]: hidden}
        self._copy([n for n in self.old if units[n] == last], tail, -1)
        return [tail[self.old.outputs[0]], *present]

    def _as_it_is(self, shared: _Env) -> list[ir.Value]:
        """Copy the layers in order, if all were traced; return the new outputs."""
        self.past = []
        for index, old in enumerate(self.caches):
            shared[old] = self._like(old, PAST[index % 2] % (index // 2))
            self.past.append(shared[old])
        self._copy(list(self.old), shared, -1)
        return [shared[value] for value in self.old.outputs]

    def _copy(self, nodes: list[ir.Node], env: _Env, layer: int) -> None:
        for node in nodes:
            if _is_mark(node):
                if self.whole:
                    env[node.outputs[0]] = self._get(_input(node), env, layer)
                continue
            name = node.name
            if layer >= 0 and name is not None:
                inside = self.layers.index(name) is not None
                name = layer_name(self.layers, name, layer) if inside else f"layer{layer}.{name}"
            new = ir.Node(
                node.domain,
                node.op_type,
                [None if v is None else self._get(v, env, layer) for v in node.inputs],
                list(node.attributes.values()),
                num_outputs=len(node.outputs),
                version=node.version,
                name=name,
            )
            for old, value in zip(node.outputs, new.outputs, strict=True):
                value.name = old.name if layer < 0 or not old.name else f"layer{layer}.{old.name}"
                value.shape, value.type = self._shape(old), old.type
                env[old] = value
            self.nodes.append(new)

    def _get(self, value: ir.Value, env: _Env, layer: int) -> ir.Value:
        if value in env:
            return env[value]
        name = value.name or ""
        if value.const_value is not None:
            if name not in self.constants:
                self.constants[name] = self._like(value, name)
            return self.constants[name]
        if value.producer() is not None or value not in self.rest:
            raise CannotRepeat(f"{name} is computed in one layer and used in another")
        inside = self.layers.index(name)
        if inside is not None and not self.whole:
            if layer < 0 or inside != self.layers.stands_for[layer]:
                raise CannotRepeat(f"{name} is used outside of its layer")
            name = layer_name(self.layers, name, layer)
        if name not in self.weights:
            self.weights[name] = self._like(value, name)
        return self.weights[name]

    def _like(self, value: ir.Value, name: str) -> ir.Value:
        return ir.Value(
            name=name, shape=self._shape(value), type=value.type, const_value=value.const_value
        )

    def _shape(self, value: ir.Value) -> ir.Shape | None:
        if value.shape is None:
            return None
        return ir.Shape(
            [d if isinstance(d, int) else self.sizes.get(str(d), str(d)) for d in value.shape]
        )


def _dim(value: ir.Value, axis: int) -> int | ir.SymbolicDim:
    assert value.shape is not None
    return value.shape[axis]


def _is_mark(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == (OURS, MARK)


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _unit(value: ir.Value, units: dict[ir.Node, int]) -> int | None:
    node = value.producer()
    return None if node is None else units.get(node)


def _units(graph: ir.Graph, layers: Layers) -> dict[ir.Node, int]:
    """The last mark that each node depends on, or the layer of its weights; -1 for none."""
    found: dict[ir.Node, int] = {}
    for node in graph:
        values = [value for value in node.inputs if value is not None]
        before = [found[p] for value in values if (p := value.producer())]
        layer = [i for v in values if v.name and (i := layers.index(v.name)) is not None]
        own = [node.attributes["layer"].as_int()] if _is_mark(node) else []
        found[node] = max([-1, *before, *layer, *own])
    return found
