"""Make an XNNPACK delegate quantize an input once for all products that read it.

Upstream: executorch 1.5.1, ``executorch.backends.xnnpack.xnnpack_preprocess``. Every product with
quantized weights quantizes its input itself, although q, k and v, gate and up, and the low-rank
terms beside them read the same input.

With another release the patch is skipped: the program computes the same but is slower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from caliport.core.patching import is_tested, swapped

if TYPE_CHECKING:
    from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import XNNGraph

RELEASES = ("executorch==1.5.*",)


@contextmanager
def quantized_once() -> Iterator[None]:
    """While the body runs, delegates are serialized with one quantization per input.

    Products with weights of different types keep separate quantizations: on some processors
    XNNPACK lays out the quantized input for the kernel that reads it.
    """
    if not is_tested(RELEASES):
        yield
        return
    from executorch.backends.xnnpack import xnnpack_preprocess as module

    plain = module.serialize_xnnpack_binary

    def serialize(graph: XNNGraph, constants: bytearray) -> bytes:
        join(graph)
        found: bytes = plain(graph, constants)
        return found

    with swapped(module, "serialize_xnnpack_binary", serialize):
        yield


def join(graph: XNNGraph) -> None:
    """Keep one quantization per input and type of weights that use it, in place."""
    from executorch.backends.xnnpack.operators.node_visitor import get_tensor_value
    from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema

    tensors = {get_tensor_value(value).id_out: value for value in graph.xvalues}
    readers: dict[int, set[Any]] = defaultdict(set)
    products = [n.xnode_union for n in graph.xnodes]
    products = [n for n in products if isinstance(n, schema.XNNFullyConnected)]
    for product in products:
        weight = get_tensor_value(tensors[product.filter_id])
        readers[product.input1_id].add(weight.datatype)
    first: dict[Hashable, int] = {}
    instead: dict[int, int] = {}
    for node in graph.xnodes:
        if isinstance(node.xnode_union, schema.XNNConvert):
            made = node.xnode_union.output_id
            if made in readers:
                key = (node.xnode_union.input_id, frozenset(readers[made]))
                kept = first.setdefault(key, made)
                if kept != made:
                    instead[made] = kept
    for product in products:
        product.input1_id = instead.get(product.input1_id, product.input1_id)
    graph.xnodes = [
        n for n in graph.xnodes if getattr(n.xnode_union, "output_id", None) not in instead
    ]
    graph.xvalues = [v for v in graph.xvalues if get_tensor_value(v).id_out not in instead]
