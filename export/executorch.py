"""Lower a decoder to an ExecuTorch program for XNNPACK, as the stock LLM runners expect it.

The traced module is ``export.executorch_decoder.Decoder``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from export.executorch_decoder import Decoder
from export.fast_lowering import fast_lowering
from export.quiet import quiet
from export.support import check_exportable

if TYPE_CHECKING:
    from executorch.exir import EdgeProgramManager
    from torch.export import ExportedProgram
    from transformers import PreTrainedModel

PROGRAM = "model.pte"

_MATRIX_OPS = ("aten_linear_", "aten_addmm_", "aten_mm_", "aten_bmm_", "aten_convolution_")


def lower(
    model: PreTrainedModel, directory: Path, context: int, eos_ids: list[int], bos_id: int | None
) -> dict[str, Any]:
    """Write ``directory/model.pte``: one method that serves prefill, chunks and single steps.

    ``forward(tokens int64 [1, n], input_pos int64 [1]) -> float32 [1, 1, vocab]``: the logits of
    the last of n tokens that stand at positions input_pos … input_pos + n - 1, for any n from 1
    while input_pos + n <= context. Keys and values stay in the program; starting at position 0
    again forgets them.

    Args:
        model: A decoder as loaded (float32) or as ``export.quantize.quantize`` left it. It is left
            as it was.
        directory: Where to; must exist.
        context: Cache length in tokens.
        eos_ids: Token ids that end a generation.
        bos_id: The token id that begins a text, if there is one. The stock runner puts it before
            a prompt only when it is told to.

    Returns:
        Manifest entries: methods, constant methods, delegate counts.

    Raises:
        InputError: The model cannot run this way; nothing is written. See ``check_exportable``.
        RuntimeError: A matrix product is left to ExecuTorch's slow reference kernels.
    """
    check_exportable(model, context)
    constants = _constant_methods(model, context, eos_ids, bos_id)
    with quiet():
        with fast_lowering():
            edge = _delegate(_trace(model, context), constants)
        counts = _count_delegated(edge)
        program = _finish(edge)
        with (directory / PROGRAM).open("wb") as stream:
            program.write_to_file(stream)
    return {
        "backend": "xnnpack",
        "methods": ["forward"],
        "constant_methods": constants,
        **counts,
    }


def _trace(model: PreTrainedModel, context: int) -> ExportedProgram:
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  registers torch.ops.llama

    tokens = torch.zeros(1, min(4, context), dtype=torch.long)
    sizes = torch.export.Dim("n", min=1, max=context)
    with torch.no_grad():
        return torch.export.export(
            Decoder(model, context).eval(),
            (tokens, torch.zeros(1, dtype=torch.long)),
            dynamic_shapes={"tokens": {1: sizes}, "input_pos": None},
            strict=False,
        )


def _constant_methods(
    model: PreTrainedModel, context: int, eos_ids: list[int], bos_id: int | None
) -> dict[str, Any]:
    """What the stock runners ask a program about itself."""
    config = model.config.get_text_config()
    methods = {
        "get_max_seq_len": context,
        "get_max_context_len": context,
        "get_n_layers": config.num_hidden_layers,
        "get_vocab_size": config.vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
        "get_eos_ids": list(eos_ids),
    }
    return methods if bos_id is None else {**methods, "get_bos_id": bos_id}


def _delegate(program: ExportedProgram, constants: dict[str, Any]) -> EdgeProgramManager:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    return to_edge_transform_and_lower(
        program,
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=constants,
    )


def _count_delegated(edge: EdgeProgramManager) -> dict[str, int]:
    """Delegates and matrix products in them; every product must be in one.

    Attention's own products do not appear: they are inside ``llama.custom_sdpa``.
    """
    from executorch.devtools.backend_debug import get_delegation_info

    info = get_delegation_info(edge.exported_program().graph_module)
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
        "linears_delegated": sum(found.delegated for found in products.values()),
        "linears_not_delegated": 0,
    }


def _finish(edge: EdgeProgramManager) -> Any:
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    return edge.to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True,
            do_quant_fusion_and_const_prop=True,
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
        )
    )
