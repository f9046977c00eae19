"""Lower a decoder to an ONNX graph for ONNX Runtime on CPU, as onnxruntime_genai expects it.

The graph comes from transformers' exporter with its ONNX Runtime fusions, over the decoder of
``export.onnx_decoder``. One graph serves prefill, chunks and single steps: it takes any number of
tokens after any number of cached ones.

Quantized products are ``MatMulNBits`` in 8 bits as well as in 4. The other 8-bit form,
``DynamicQuantizeLinear`` with ``MatMulInteger``, was measured with ONNX Runtime 1.31 on x86 with
AVX2, on 2048 x 2048 weights over the whole range of 8 bits and an input with an outlier. It is a
third faster on one token and three times on 128, but was up to 90 % wrong, since AVX2 adds pairs
of 8-bit products in 16 bits and saturates. It also shares one activation scale among all tokens,
so that a prefill would not equal the same tokens one by one. ``MatMulNBits`` was 0.9 to 1.5 % off
there, which is the rounding of its input alone.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from caliport_core.checkpoints import eos_ids
from caliport_core.errors import InputError
from export.onnx_decoder import Decoder
from export.onnx_weights import swap_weights
from export.quantize import dequantize
from export.quiet import quiet
from export.support import check_exportable

if TYPE_CHECKING:
    import onnx_ir
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
GENAI_CONFIG = "genai_config.json"

_TOKENS, _MASK, _POSITIONS, _LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
# The names that onnxruntime_genai and optimum look for by themselves.
_PAST = ("past_key_values.%d.key", "past_key_values.%d.value")
_PRESENT = ("present.%d.key", "present.%d.value")
_BITS = {"int8": 8, "int4": 4}


def lower(
    model: PreTrainedModel,
    directory: Path,
    precision: str,
    context: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    threads: int | None = None,
) -> dict[str, Any]:
    """Write ``model.onnx``, its weights ``model.onnx.data`` and ``genai_config.json``.

    The graph takes ``input_ids`` and ``position_ids`` int64 [1, n], ``attention_mask`` int64
    [1, past + n] of ones, and per layer a key and a value float32 [1, kv heads, past, head size];
    it gives ``logits`` float32 [1, 1, vocab] of the last token and the longer caches. n >= 1,
    past >= 0, past + n <= context. Past and present may be one buffer of any larger size.

    Args:
        model: A decoder as loaded (``fp32``) or as ``export.quantize.quantize`` left it. It is left
            as it was.
        directory: Where to; must exist.
        precision: What the model was quantized to.
        context: Most tokens, prompt and answer together.
        tokenizer: Gives the special tokens' ids that the model's settings do not.
        threads: Written as ``intra_op_num_threads`` for onnxruntime_genai. None leaves it to the
            device: ONNX Runtime then takes one thread a physical core, which is right for a phone
            and too few where two hyper-threads of one core are all there is. The number of cores
            of the machine that exports is never written by itself.

    Returns:
        Manifest entries: how many of each operator, quantized layers, threads.

    Raises:
        InputError: The model cannot be exported this way, or a linear layer cannot be found in the
            graph. Nothing is left behind where ``directory`` is one of ``new_directory``.
    """
    check_exportable(model, context)
    _check_forward(model)
    traced = model if precision == "fp32" else dequantize(model)
    program = _trace(traced, context)
    graph = program.graph
    _name_caches(graph, _layers(model))
    quantized = {} if precision == "fp32" else swap_weights(graph, traced, model, _BITS[precision])
    _strip(program)
    _save(program, directory)
    config = _genai_config(model, context, tokenizer, threads)
    (directory / GENAI_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    operators = Counter(node.op_type for node in graph.all_nodes())
    return {
        "backend": "onnxruntime cpu",
        **quantized,
        "operators": dict(sorted(operators.items())),
        "threads": threads,
    }


def _layers(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().num_hidden_layers)


def _trace(model: PreTrainedModel, context: int) -> onnx_ir.Model:
    """The decoder as a graph of ONNX Runtime's operators, over a cache of any length."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    heads, head_size = _cache_shape(model)
    # Sizes of 0 and 1 would be taken for constants.
    caches = [torch.zeros(1, heads, 3, head_size) for _ in range(2 * _layers(model))]
    inputs: dict[str, Any] = {
        _TOKENS: torch.zeros(1, 2, dtype=torch.long),
        _MASK: torch.ones(1, 5, dtype=torch.long),
        _POSITIONS: torch.tensor([[3, 4]]),
        "past": caches,
    }
    count = torch.export.Dim("n", min=1, max=context)
    total = torch.export.Dim("total", min=1, max=context)
    past = torch.export.Dim("past", min=0, max=context)
    shapes = {
        _TOKENS: {1: count},
        _MASK: {1: total},
        _POSITIONS: {1: count},
        "past": [{2: past}] * len(caches),
    }
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, ort_fusions="cpu")
    try:
        # torch.onnx 2.13 prints its progress.
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            decoder: Any = Decoder(model).eval()  # any module will do, whatever its types say
            return OnnxExporter().export(decoder, inputs, config).program
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{type(model).__name__}: transformers' exporter cannot trace it to onnx ({reason})"
        ) from error


def _check_forward(model: PreTrainedModel) -> None:
    """Without positions of ours, a model would count from 0 in every step."""
    takes = inspect.signature(model.forward).parameters
    for name in (_POSITIONS, "logits_to_keep"):
        if name not in takes:
            raise InputError(
                f"{type(model).__name__}: its forward takes no {name}; this architecture cannot be "
                "exported to onnx yet"
            )


def _cache_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Key-value heads and the size of a head."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(heads), int(size)


def _name_caches(graph: onnx_ir.Graph, layers: int) -> None:
    """Give the past its usual names; the exporter names inputs after how they are nested.

    Raises:
        InputError: Other inputs or outputs than those we traced, such as a cache that is not used.
    """
    inputs = [_TOKENS, _MASK, _POSITIONS, *(f"past.{i}" for i in range(2 * layers))]
    outputs = [_LOGITS, *(name % i for i in range(layers) for name in _PRESENT)]
    for values, expected in ((graph.inputs, inputs), (graph.outputs, outputs)):
        found = [value.name for value in values]
        if found != expected:
            odd = next(iter(set(expected) ^ set(map(str, found))), "another order")
            raise InputError(f"the traced graph does not have the expected caches: {odd}")
    for index, value in enumerate(graph.inputs[3:]):
        value.name = _PAST[index % 2] % (index // 2)


def _strip(program: onnx_ir.Model) -> None:
    """Drop what tracing notes beside the graph: stack traces, which name this machine's files."""
    graph = program.graph
    program.metadata_props.clear()
    graph.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def _save(program: onnx_ir.Model, directory: Path) -> None:
    import onnx_ir

    onnx_ir.save(program, directory / GRAPH, external_data=WEIGHTS)


def _genai_config(
    model: PreTrainedModel,
    context: int,
    tokenizer: PreTrainedTokenizerBase,
    threads: int | None,
) -> dict[str, Any]:
    """What onnxruntime_genai asks about a graph; its type ``decoder`` is any decoder."""
    config = model.config.get_text_config()
    ends = eos_ids(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    kv_heads, head_size = _cache_shape(model)
    session: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if threads is not None:
        session["intra_op_num_threads"] = threads
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else pad,
            "eos_token_id": ends,
            "pad_token_id": pad,
            "context_length": context,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": session,
                "filename": GRAPH,
                "head_size": head_size,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "num_key_value_heads": kv_heads,
                "inputs": {
                    "input_ids": _TOKENS,
                    "attention_mask": _MASK,
                    "position_ids": _POSITIONS,
                    "past_key_names": _PAST[0],
                    "past_value_names": _PAST[1],
                },
                "outputs": {
                    "logits": _LOGITS,
                    "present_key_names": _PRESENT[0],
                    "present_value_names": _PRESENT[1],
                },
            },
        },
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": True},
    }
