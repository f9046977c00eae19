"""Lower a decoder to an ExecuTorch program for XNNPACK, as the stock LLM runners expect it.

The modelling code stays Hugging Face's own. Two things are put in its place while it is traced:
attention is ExecuTorch's ``llama.custom_sdpa`` and the cache is written by ``llama.update_cache``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from caliport_core.errors import InputError
from export.fast_lowering import fast_lowering
from export.quiet import quiet

if TYPE_CHECKING:
    from executorch.exir import EdgeProgramManager
    from torch.export import ExportedProgram
    from transformers import PreTrainedModel

PROGRAM = "model.pte"

_ATTENTION = "caliport_executorch"
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


def check_exportable(model: PreTrainedModel, context: int) -> None:
    """Check what can be known before any work.

    Raises:
        InputError: ``context`` out of the model's range; layers other than full attention within
            ``context``; rotary embeddings that change with the length of the text.
    """
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if context < 1 or (longest is not None and context > longest):
        raise InputError(f"context: found {context}, expected 1 to the model's {longest} positions")
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    odd = kinds - {"full_attention", "sliding_attention"}
    if odd:
        raise InputError(
            f"config.json: layer_types has {', '.join(sorted(odd))}, expected full_attention"
        )
    slides = "sliding_attention" in kinds or not hasattr(config, "layer_types")
    if slides and window is not None and context > window:
        raise InputError(
            f"context: found {context}, expected at most the model's sliding window of {window}"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise InputError(
            f"config.json: rope_type is {rope}, which depends on the length of the text; "
            "expected a fixed one"
        )


def check_attention(options: Mapping[str, Any], runtime: str) -> None:
    """Check what a model asks of its attention function beyond plain softmax attention.

    Raises:
        InputError: Soft-capped scores or attention sinks, which the kernels do not compute.
    """
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise InputError(
                f"config.json: attention with {name} cannot be exported to {runtime} yet; "
                "expected plain softmax attention"
            )


class _CacheLayer(CacheLayerMixin):
    """One layer's keys and values, [1, context, heads, dim] each, written in place."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True
        self.start = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take [1, heads, n, dim] each; return the whole cache as [1, context, heads, dim]."""
        torch.ops.llama.update_cache(key_states.transpose(1, 2), self.keys, self.start)
        torch.ops.llama.update_cache(value_states.transpose(1, 2), self.values, self.start)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[1], 0

    def get_seq_length(self) -> int:
        return self.start

    def get_max_length(self) -> int:
        return self.keys.shape[1]


class _Decoder(nn.Module):
    """The method ``forward`` of the program."""

    def __init__(self, model: PreTrainedModel, context: int) -> None:
        super().__init__()
        self.model = model
        self.context = context
        config = model.config.get_text_config()
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.layers = config.num_hidden_layers
        for index in range(self.layers):
            for name in ("keys", "values"):
                self.register_buffer(f"{name}_{index}", torch.zeros(1, context, heads, dim))

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        start = input_pos[0].item()
        torch._check(start >= 0)
        torch._check(start + tokens.shape[1] <= self.context)
        cache = Cache(layers=[self._layer(index, start) for index in range(self.layers)])
        positions = torch.arange(tokens.shape[1]).unsqueeze(0) + start
        with _custom_attention(self.model, start):
            return self.model(
                input_ids=tokens,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits

    def _layer(self, index: int, start: Any) -> _CacheLayer:
        layer = _CacheLayer(getattr(self, f"keys_{index}"), getattr(self, f"values_{index}"))
        layer.start = start
        return layer


def _attention_from(start: Any) -> Callable[..., tuple[Tensor, None]]:
    def attention(
        _module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        check_attention(kwargs, "executorch")
        out = torch.ops.llama.custom_sdpa(
            query.transpose(1, 2), key, value, start, None, 0.0, True, scaling
        )
        return out, None

    return attention


@contextmanager
def _custom_attention(model: PreTrainedModel, start: Any) -> Iterator[None]:
    """Let the model attend through ``llama.custom_sdpa``, which masks by position itself."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    AttentionInterface.register(_ATTENTION, _attention_from(start))
    AttentionMaskInterface.register(_ATTENTION, lambda *args, **kwargs: None)
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
        AttentionInterface._global_mapping.pop(_ATTENTION)
        AttentionMaskInterface._global_mapping.pop(_ATTENTION)


def _trace(model: PreTrainedModel, context: int) -> ExportedProgram:
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  registers torch.ops.llama

    tokens = torch.zeros(1, min(4, context), dtype=torch.long)
    sizes = torch.export.Dim("n", min=1, max=context)
    with torch.no_grad():
        return torch.export.export(
            _Decoder(model, context).eval(),
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
