"""The steps from a skeleton to an ExecuTorch program, shared by single artifacts and bundles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from caliport.core.progress import at
from caliport.export.decoder.skeleton import Layers, boundary_op, marked
from caliport.export.executorch.decoder import Decoder
from caliport.export.executorch.patches import check_releases
from caliport.export.executorch.patches.means_as_products import means_as_products
from caliport.export.executorch.patches.quantized_lookup import quantized_lookup
from caliport.export.executorch.patches.weight_keys import (
    constants_of,
    deferred_weights,
    fill_delegates,
)

if TYPE_CHECKING:
    from executorch.exir import EdgeProgramManager
    from torch.export import ExportedProgram
    from transformers import PreTrainedModel

    from caliport.export.decoder.stored import Weights

_MATRIX_OPS = ("aten_linear_", "aten_addmm_", "aten_mm_", "aten_bmm_", "aten_convolution_")


@dataclass(frozen=True)
class Lowered:
    """A lowered skeleton.

    Attributes:
        program: Its graph, with XNNPACK's delegates and the marks between layers.
        names: Names of the weights in the skeleton, by key.
        constants: Other constants of the delegates, by key.
    """

    program: ExportedProgram
    names: dict[str, str]
    constants: dict[str, bytes]


def lower_skeleton(
    model: PreTrainedModel,
    layers: Layers,
    context: int,
    is_weight: Callable[[str], bool],
    while_tracing: AbstractContextManager[None] | None = None,
    cache_bits: int | None = None,
) -> Lowered:
    """Trace a furnished skeleton and lower it to XNNPACK.

    Args:
        model: The skeleton, after ``caliport.export.decoder.skeleton.furnish``.
        layers: Which layers its layers represent.
        context: Cache length in tokens.
        is_weight: Whether a parameter of the skeleton gets its content after lowering.
        while_tracing: A context manager that is active during the trace.
        cache_bits: 8 for keys and values in int8, None for float32.

    Raises:
        InputError: An installed release was not tested with the patches.
    """
    check_releases()
    names: dict[str, str] = {}
    at("tracing")
    with while_tracing or nullcontext():
        traced = _trace(model, layers, context, cache_bits)
    at(f"lowering {len(layers.kept)} of {len(layers.stands_for)} layers")
    with deferred_weights(is_weight, names):
        edge = _delegate(traced)
    return Lowered(edge.exported_program(), names, constants_of(edge, names))


def with_weights(
    programs: Mapping[str, ExportedProgram],
    methods: dict[str, Any],
    weights: Weights,
    used: Iterable[str],
    constants: Mapping[str, bytes],
) -> EdgeProgramManager:
    """Combine the methods of a program with the contents of their delegates.

    Args:
        programs: Methods by name.
        methods: Constant methods.
        weights: The stored weights.
        used: Names of the weights that the methods use.
        constants: Other constants of their delegates, by key.
    """
    from executorch.exir import EdgeCompileConfig, EdgeProgramManager

    config = EdgeCompileConfig(_check_ir_validity=False)
    edge = EdgeProgramManager(dict(programs), methods, config)
    fill_delegates(edge, weights, used, constants)
    return edge


def _trace(
    model: PreTrainedModel, layers: Layers, context: int, cache_bits: int | None
) -> ExportedProgram:
    import executorch.extension.llm.custom_ops.custom_ops  # registers torch.ops.llama

    if cache_bits is not None:
        import executorch.kernels.quantized  # noqa: F401  registers the rounding operators

    tokens = torch.zeros(1, min(4, context), dtype=torch.long)
    sizes = torch.export.Dim("n", min=1, max=context)
    decoder = Decoder(model, context, cache_bits).eval()
    config = model.config.get_text_config()
    normed = {config.hidden_size, getattr(config, "head_dim", None)} - {None}
    with (
        torch.no_grad(),
        marked(model, layers.path, boundary_op()),
        quantized_lookup(),
        means_as_products(decoder, normed),
    ):
        return torch.export.export(
            decoder,
            (tokens, torch.zeros(1, dtype=torch.long)),
            dynamic_shapes={"tokens": {1: sizes}, "input_pos": None},
            strict=False,
        )


def _delegate(program: ExportedProgram) -> EdgeProgramManager:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    return to_edge_transform_and_lower(
        program,
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )


def count_delegated(edge: EdgeProgramManager) -> dict[str, int]:
    """Count delegates and the matrix products in them; every product must be in a delegate.

    Attention's products do not appear: they are inside ``llama.custom_sdpa``.
    """
    from executorch.devtools.backend_debug import get_delegation_info

    info = get_delegation_info(edge.exported_program(next(iter(edge.methods))).graph_module)
    products = {
        name: found
        for name, found in info.delegation_by_operator.items()
        if f"{name}_".startswith(_MATRIX_OPS)
    }
    left = sorted(name for name, found in products.items() if found.non_delegated)
    if left:
        raise RuntimeError(f"XNNPACK did not take {', '.join(left)}; the program would be slow")
    return {
        "delegates": info.num_delegated_subgraphs,
        "products_delegated": sum(found.delegated for found in products.values()),
    }


def finish(edge: EdgeProgramManager, share_cache: bool = False) -> Any:
    """Emit the program.

    Args:
        edge: The lowered methods with their weights.
        share_cache: Let all methods share the memory of their caches.
    """
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    at("emitting the program")
    return edge.to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True,
            do_quant_fusion_and_const_prop=True,
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
            memory_planning_pass=MemoryPlanningPass(
                alloc_graph_input=False, share_mutable_buffers=share_cache
            ),
        )
    )
