"""Key an ExecuTorch program's weights by name while lowering, and add their contents afterwards.

Upstream: executorch 1.5.1, ``executorch.backends.xnnpack.operators.node_visitor.NodeVisitor``.
XNNPACK's lowering copies a delegate's constants and keys them by the hash of their content. While
a skeleton is lowered, its weights have no content, so they are keyed by the hash of their name.

Without the patch a program would contain zeros. With another release, export fails with an error.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from caliport.core.patching import check_tested, swapped

if TYPE_CHECKING:
    from executorch.exir import EdgeProgramManager

    from caliport.export.decoder.stored import Stored, Weights

RELEASES = ("executorch==1.5.*",)
_SCALE = "scale_"
_HALF = ".weight.half"
# Name endings of the parts of a torchao tensor, of an embedding
# (``caliport.export.decoder.skeleton.furnish``), and of a matrix that ships in float16.
_ENDINGS = {
    ".weight.original0": ".weight.data",
    ".weight.original1": ".weight.scale",
    ".weight_data": ".weight.data",
    ".weight_scale": ".weight.scale",
    ".weight_half": _HALF,
}
_ALIGNMENT = 16
# Hexadecimal digits of a key. Short, since each method lists all its keys, but still unique.
_DIGITS = 16
KEY = re.compile(rb"(?:scale_)?[0-9a-f]{%d}" % _DIGITS)


def stored_name(target: str) -> str:
    """The name in ``Weights`` of the parameter ``target`` in a traced decoder's signature."""
    name = target.removeprefix("model.").replace(".parametrizations", "")
    for ending, kept in _ENDINGS.items():
        if name.endswith(ending):
            return name.removesuffix(ending) + kept
    return name


def _key_of(name: str) -> str:
    """The key of a weight while lowering; as long as its final key."""
    digest = hashlib.sha256(f"deferred {name}".encode()).hexdigest()[:_DIGITS]
    return _SCALE + digest if name.endswith(".scale") else digest


def final_key(name: str, stored: Stored) -> str:
    """The final key of a weight: the first digits of its content's hash.

    XNNPACK's own lowering uses the whole hash. The runtime packs weights with equal keys once.
    """
    digest = stored.sha256.hex()[:_DIGITS]
    return _SCALE + digest if name.endswith(".scale") else digest


def constants_of(edge: EdgeProgramManager, names: Mapping[str, str]) -> dict[str, bytes]:
    """The constants of a lowered program's delegates by key, without the weights in ``names``."""
    store = edge._named_data_store
    return {
        key: store.buffers[entry.buffer_index]
        for key, entry in store.pte_data.items()
        if key not in names
    }


def fill_delegates(
    edge: EdgeProgramManager,
    weights: Weights,
    used: Iterable[str],
    constants: Mapping[str, bytes],
) -> None:
    """Add the contents of a program's delegates.

    Args:
        edge: The program; previous contents of its delegates are dropped.
        weights: The stored weights.
        used: Names of the weights that the delegates use.
        constants: The delegates' other constants, by key.
    """
    from executorch.exir._serialize._cord import FileBackedData
    from executorch.exir._serialize._named_data_store import NamedDataStore

    store = edge._named_data_store = NamedDataStore()
    for key, content in sorted(constants.items()):
        store.add_named_data(key, content, _ALIGNMENT)
    for name in sorted(set(used)):
        stored = weights[name]
        data = FileBackedData(str(stored.path), sha256=stored.sha256)
        store.add_named_data(final_key(name, stored), data, _ALIGNMENT)


@contextmanager
def deferred_weights(is_deferred: Callable[[str], bool], names: dict[str, str]) -> Iterator[None]:
    """While the body runs, XNNPACK's lowering keys deferred weights by name.

    Weights whose ``stored_name`` ends in ``.weight.half`` are float16 for XNNPACK and float32 in
    the graph.

    Args:
        is_deferred: Whether the weight of a given name is deferred.
        names: Receives the name for every key.

    Raises:
        InputError: The installed release was not tested with this patch.
    """
    check_tested(RELEASES)
    from executorch.backends.xnnpack.operators import node_visitor as module
    from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema

    visitor = module.NodeVisitor
    index_of, params_of = visitor.get_serialized_buffer_index, visitor.get_quant_params
    dtype_of = visitor.get_serialized_dtype

    def name_of(self: Any, node: torch.fx.Node) -> str | None:
        signature = self.exported_program.graph_signature
        target = signature.inputs_to_parameters.get(node.name)
        if target is None:
            return None
        name = stored_name(target)
        return name if is_deferred(name) else None

    def register(self: Any, graph: Any, name: str, size: int) -> int:
        key = _key_of(name)
        names[key] = name
        offset = module.UINT64_MAX
        graph.constant_data.append(schema.ConstantDataOffset(offset, size, key))
        self._named_data_store.add_named_data(key, key.encode())
        return len(graph.constant_data) - 1

    def get_serialized_buffer_index(
        self: Any,
        tensor: torch.fx.Node,
        xnn_graph: Any,
        vals_to_ids: Any,
        convert_to_nhwc: bool,
        swap_in_out_for_weights: bool,
        quant_params: Any,
        *rest: Any,
    ) -> int:
        node = tensor if quant_params is None else quant_params.q_input
        name = name_of(self, node)
        if name is None:
            return int(
                index_of(
                    self,
                    tensor,
                    xnn_graph,
                    vals_to_ids,
                    convert_to_nhwc,
                    swap_in_out_for_weights,
                    quant_params,
                    *rest,
                )
            )
        assert not convert_to_nhwc
        assert not swap_in_out_for_weights
        value = node.meta["val"]
        size = value.numel() * value.element_size()
        if name.endswith(_HALF) or (quant_params is not None and quant_params.is_qc4w):
            size //= 2
        return register(self, xnn_graph, name, size)

    def get_serialized_dtype(
        self: Any, quant_params: Any, node: torch.fx.Node, *rest: Any, **options: Any
    ) -> Any:
        if (name_of(self, node) or "").endswith(_HALF):
            return schema.XNNDatatype.xnn_datatype_fp16
        return dtype_of(self, quant_params, node, *rest, **options)

    def get_quant_params(self: Any, params: Any, graph: Any, tag: str | None = None) -> Any:
        name = name_of(self, params.q_input) if params.per_channel else None
        if name is None:
            return params_of(self, params, graph, tag)
        count = math.prod(params.scale.shape)
        size = count * (2 if params.per_channel_group else 4)
        index = register(self, graph, name.replace(".data", ".scale"), size)
        if params.per_channel_group:
            return schema.PerChannelGroupQuant(
                scale=[],
                channel_dim=params.axis,
                group_size=params.group_size,
                scale_buffer_idx=index,
                num_scales=count,
            )
        return schema.PerChannelQuant(
            scale=[], channel_dim=params.axis, scale_buffer_idx=index, num_scales=count
        )

    with (
        swapped(visitor, "get_serialized_buffer_index", get_serialized_buffer_index),
        swapped(visitor, "get_quant_params", get_quant_params),
        swapped(visitor, "get_serialized_dtype", get_serialized_dtype),
    ):
        yield
