"""Repeat the lowered layers of a skeleton to get the program of the whole decoder.

The graph of a lowered skeleton consists of the part before the first layer, the layers between
their marks (``caliport.export.decoder.skeleton.marked``) and the part after the last. A layer's
nodes are copied for every layer that it represents, with that layer's parameters, caches and keys
of weights in its delegates. The marks are removed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import ExportGraphSignature, InputKind, OutputKind, OutputSpec

from caliport.export.decoder.skeleton import CannotRepeat
from caliport.export.executorch.patches.weight_keys import KEY, final_key, stored_name

if TYPE_CHECKING:
    from executorch.exir.lowered_backend_module import LoweredBackendModule
    from torch.export import ExportedProgram

    from caliport.export.decoder.skeleton import Layers
    from caliport.export.decoder.stored import Weights
    from caliport.export.executorch.steps import Lowered

_CACHE = re.compile(r"^((?:keys|values)(?:_scale|_zero)?)_(\d+)$")


def repeat(
    lowered: Lowered,
    layers: Layers,
    weights: Weights,
    stored: Callable[[str], str] = lambda name: name,
) -> tuple[ExportedProgram, set[str]]:
    """Make the program of the whole decoder.

    Args:
        lowered: The lowered skeleton.
        layers: Which layer of the skeleton represents which layers.
        weights: The weights of the whole decoder.
        stored: Maps the name of the whole decoder's parameter to its name in ``weights``.

    Returns:
        The program, and the names of the weights that its delegates use.

    Raises:
        CannotRepeat: A layer uses a value computed in another layer, other than the first.
    """
    return _Repeater(lowered, layers, weights, stored).run()


class _Repeater:
    def __init__(
        self, lowered: Lowered, layers: Layers, weights: Weights, stored: Callable[[str], str]
    ) -> None:
        self.program, self.names = lowered.program, lowered.names
        self.layers, self.weights, self.stored = layers, weights, stored
        self.used: set[str] = set()
        self.root = torch.nn.Module()
        self.graph = fx.Graph()
        self.modules = 0
        self.state: dict[str, Tensor] = {}

    def run(self) -> tuple[ExportedProgram, set[str]]:
        unit_of = _units(self.program.graph, len(self.layers.kept))
        marks = {int(n.args[1]): n for n in self.program.graph.nodes if _is_mark(n)}
        count = len(self.layers.stands_for)
        inputs = self._inputs(count)
        shared: dict[fx.Node, fx.Node] = {n: new for (n, layer), new in inputs.items() if layer < 0}
        nodes = [n for n in self.program.graph.nodes if n.op not in ("placeholder", "output")]
        self._copy([n for n in nodes if unit_of[n] < 0], shared, -1, inputs)
        hidden = shared[_only(marks[0].args[0])]
        by_layer: list[dict[fx.Node, fx.Node]] = []
        for layer, kept in enumerate(self.layers.stands_for):
            env = dict(shared)
            env[marks[kept]] = hidden
            self._copy([n for n in nodes if unit_of[n] == kept], env, layer, inputs)
            hidden = env[_only(marks[kept + 1].args[0])]
            by_layer.append(env)
            if layer == 0:  # values that it computes for all layers, such as rotary embeddings
                shared.update({n: new for n, new in env.items() if unit_of.get(n) == 0})
        tail = dict(shared)
        last = len(self.layers.kept)
        tail[marks[last]] = hidden
        self._copy([n for n in nodes if unit_of[n] == last], tail, -1, inputs)
        signature = self._outputs(inputs, by_layer, tail)
        return self._finish(signature), self.used

    def _inputs(self, count: int) -> dict[tuple[fx.Node, int], fx.Node]:
        """Make the placeholders; a layer's are repeated for every layer that it represents."""
        self.input_specs = []
        found: dict[tuple[fx.Node, int], fx.Node] = {}
        nodes = {n.name: n for n in self.program.graph.nodes if n.op == "placeholder"}
        for spec in self.program.graph_signature.input_specs:
            node = nodes[spec.arg.name]
            kept = None if spec.target is None else self._layer_of(spec.target)
            wanted = (
                [-1]
                if kept is None
                else [i for i in range(count) if self.layers.stands_for[i] == kept]
            )
            for layer in wanted:
                target = spec.target if kept is None else self._renamed(spec.target, layer)
                name = node.name if kept is None else (target or "").replace(".", "_")
                new = self.graph.placeholder(name)
                new.meta = dict(node.meta)
                if spec.kind == InputKind.PARAMETER:  # a stand-in's strides are 0
                    contiguous = torch.contiguous_format
                    new.meta["val"] = torch.empty_like(node.meta["val"], memory_format=contiguous)
                found[node, layer] = new
                changed = copy.copy(spec)
                changed.arg = copy.copy(spec.arg)
                changed.arg.name, changed.target = new.name, target
                self.input_specs.append(changed)
                if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and target is not None:
                    self._keep(spec.target, target)
        return found

    def _layer_of(self, target: str | None) -> int | None:
        if target is None:
            return None
        if cache := _CACHE.match(target):
            return int(cache[2])
        return self.layers.index(target.removeprefix("model.")) if self.layers.path else None

    def _renamed(self, target: str | None, layer: int) -> str:
        assert target is not None
        if cache := _CACHE.match(target):
            return f"{cache[1]}_{layer}"
        return "model." + self.layers.full_name(target.removeprefix("model."), layer)

    def _keep(self, old: str | None, target: str) -> None:
        name = self.stored(stored_name(target))
        if name in self.weights:
            value = self.weights[name].tensor()
            value = value.float() if value.dtype == torch.bfloat16 else value
            self.state[target] = torch.nn.Parameter(value, requires_grad=False)
        elif old in self.program.state_dict:
            self.state[target] = self.program.state_dict[old]

    def _copy(
        self,
        nodes: list[fx.Node],
        env: dict[fx.Node, fx.Node],
        layer: int,
        inputs: dict[tuple[fx.Node, int], fx.Node],
    ) -> None:
        def get(node: fx.Node) -> fx.Node:
            if node in env:
                return env[node]
            found = inputs.get((node, layer))
            if found is None:
                raise CannotRepeat(f"{node.name} is computed in one layer and used in another")
            return found

        for node in nodes:
            if _is_mark(node):
                continue
            new = self.graph.node_copy(node, get)
            new.meta = dict(node.meta)
            if node.op == "get_attr":
                new.target = self._delegate(node, layer)
            env[node] = new

    def _delegate(self, node: fx.Node, layer: int) -> str:
        from executorch.exir.lowered_backend_module import LoweredBackendModule

        old = getattr(self.program.graph_module, str(node.target))
        name = f"lowered_module_{self.modules}"
        self.modules += 1
        if isinstance(old, LoweredBackendModule):
            old = self._with_keys(old, layer)
        setattr(self.root, name, old)
        return name

    def _with_keys(self, old: LoweredBackendModule, layer: int) -> LoweredBackendModule:
        from executorch.exir.lowered_backend_module import LoweredBackendModule

        def real(match: re.Match[bytes]) -> bytes:
            name = self.names.get(match[0].decode())
            if name is None:
                return match[0]
            if layer >= 0 and self.layers.index(name) is not None:
                name = self.layers.full_name(name, layer)
            name = self.stored(name)
            self.used.add(name)
            return final_key(name, self.weights[name]).encode()

        new = LoweredBackendModule(
            old.original_module,
            old.backend_id,
            KEY.sub(real, bytes(old.processed_bytes)),
            old.compile_specs,
            old.named_data_store_output,
        )
        new.meta = copy.copy(old.meta)
        return new

    def _outputs(
        self,
        inputs: dict[tuple[fx.Node, int], fx.Node],
        by_layer: list[dict[fx.Node, fx.Node]],
        tail: dict[fx.Node, fx.Node],
    ) -> ExportGraphSignature:
        old = next(n for n in self.program.graph.nodes if n.op == "output")
        nodes = {n.name: n for n in old.args[0]}
        specs: list[OutputSpec] = []
        values: list[fx.Node] = []
        for spec in self.program.graph_signature.output_specs:
            node = nodes[spec.arg.name]
            kept = self._layer_of(spec.target) if spec.kind == OutputKind.BUFFER_MUTATION else None
            if kept is None:
                wanted = [(tail, spec.target)]
            else:
                wanted = [
                    (env, self._renamed(spec.target, i))
                    for i, env in enumerate(by_layer)
                    if self.layers.stands_for[i] == kept
                ]
            for env, target in wanted:
                new = copy.copy(spec)
                new.arg = copy.copy(spec.arg)
                new.arg.name, new.target = env[node].name, target
                specs.append(new)
                values.append(env[node])
        output = self.graph.output(tuple(values))
        output.meta = dict(old.meta)
        return ExportGraphSignature(input_specs=self.input_specs, output_specs=specs)

    def _finish(self, signature: ExportGraphSignature) -> ExportedProgram:
        from torch.export import ExportedProgram

        old = self.program
        module = fx.GraphModule(self.root, self.graph)
        module.meta.update(old.graph_module.meta)
        return ExportedProgram(
            root=module,
            graph=module.graph,
            graph_signature=signature,
            state_dict={
                **{k: v for k, v in old.state_dict.items() if k in self.state},
                **self.state,
            },
            range_constraints=copy.copy(old.range_constraints),
            module_call_graph=copy.deepcopy(old.module_call_graph),
            example_inputs=old.example_inputs,
            constants=dict(old.constants),  # a copy: passes remove the constants that they fold
            verifiers=[old.verifier],
        )


def _is_mark(node: fx.Node) -> bool:
    return node.op == "call_function" and "caliport.boundary" in str(node.target)


def _only(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


def _units(graph: fx.Graph, count: int) -> dict[fx.Node, int]:
    """The last mark that each node depends on; -1 for none."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        before = [found[n] for n in node.all_input_nodes]
        own = [int(node.args[1])] if _is_mark(node) else []
        found[node] = max([-1, *before, *own])
    # A delegate's module belongs to the unit that calls it.
    for node in graph.nodes:
        if node.op == "get_attr":
            found[node] = max([found[user] for user in node.users], default=-1)
    assert set(found.values()) <= set(range(-1, count + 1))
    return found
