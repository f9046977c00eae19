"""Lower a decoder to an ONNX graph for ONNX Runtime on CPU that onnxruntime_genai can run.

A skeleton of the decoder is traced (``graph/trace.py``) and its layers are repeated
(``graph/repeat.py``); the weights are added last, from files
(``graph/weights.py``). One graph serves prefill, chunked prefill and decode steps: it
takes any number of tokens after any number of cached ones.

Quantized products are ``MatMulNBits`` both in 8 and in 4 bits. The alternative for 8 bits,
``DynamicQuantizeLinear`` with ``MatMulInteger``, was measured with ONNX Runtime 1.31 on x86 with
AVX2, on 2048 x 2048 weights over the whole range of 8 bits and an input with an outlier. It is a
third faster on one token and three times faster on 128, but its error was up to 90 %, since AVX2
adds pairs of 8-bit products in 16 bits and saturates. It also uses one activation scale for all
tokens, so prefill and the same tokens one by one would give different results. The error of
``MatMulNBits`` was 0.9 to 1.5 % there, which is only the rounding of its input.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.checkpoints import eos_ids
from caliport.export.decoder.parts import cache_shape
from caliport.export.decoder.shipped import ShippedDecoder, every, group
from caliport.export.decoder.skeleton import CannotRepeat, shape_of, skeleton
from caliport.export.onnx.files import GENAI_CONFIG, GRAPH, WEIGHTS
from caliport.export.onnx.graph.fuse import fuse_between_layers, fuse_inside_layers
from caliport.export.onnx.graph.repeat import PAST, PRESENT, repeat
from caliport.export.onnx.graph.trace import LOGITS, MASK, POSITIONS, TOKENS, trace
from caliport.export.onnx.graph.weights import write_weights

if TYPE_CHECKING:
    import onnx_ir
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from caliport.export.decoder.skeleton import Layers

THREADS = 4
"""Number of threads in ``genai_config.json``: the number of fast cores of a phone.

ONNX Runtime's default is one thread per physical core, which includes a phone's slow cores and
uses one of two hyper-threads. More threads than cores cost little if waiting threads sleep, so
``session.intra_op.allow_spinning`` is 0: with 1.24 B parameters in int4 on 2 hyper-threads of an
AMD EPYC this decodes at 0.90 of the rate of 2 spinning threads; 4 spinning threads reach 0.4 and 1
reaches 0.55."""

_TRACED: OrderedDict[Hashable, onnx_ir.Model] = OrderedDict()
_MOST = 4


def lower(
    decoder: ShippedDecoder,
    directory: Path,
    context: int,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Write ``model.onnx``, its weights ``model.onnx.data`` and ``genai_config.json``.

    The graph takes ``input_ids`` and ``position_ids`` int64 [1, n], ``attention_mask`` int64
    [1, past + n] of ones, and per layer a key and a value float32 [1, kv heads, past, head size];
    it returns ``logits`` float32 [1, 1, vocab] of the last token and the caches with the new tokens
    added. n >= 1, past >= 0, past + n <= context. Past and present may share one larger buffer.
    Positions must be past … past + n - 1: attention with built-in rotary embeddings assumes them.

    Args:
        decoder: The decoder and its weights as they ship.
        directory: Where to write; must exist.
        context: Maximum number of tokens, prompt and answer together.
        tokenizer: Source of special tokens' ids that are not in the model's settings.

    Returns:
        Manifest entries: number of each operator, quantized layers.

    Raises:
        InputError: The model cannot be exported this way. If ``directory`` comes from
            ``new_directory``, no partial output remains.
    """
    program = graph_of(decoder, context)
    save(program, decoder, directory)
    config = genai_config(decoder.whole, context, tokenizer)
    (directory / GENAI_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return describe(program, decoder)


def graph_of(
    decoder: ShippedDecoder, context: int, change: Callable[[onnx_ir.Graph], None] | None = None
) -> onnx_ir.Model:
    """The graph of a decoder, with its weights as the last inputs.

    Args:
        decoder: The decoder to trace.
        context: Maximum number of tokens.
        change: Called with the graph of all layers while each linear layer is still a separate
            product with the layer's name. If None, the products for query, key and value are
            joined.
    """
    try:
        return _repeated(decoder, group(decoder), context, change)
    except CannotRepeat:
        return _repeated(decoder, every(decoder), context, change)


def _repeated(
    decoder: ShippedDecoder,
    layers: Layers,
    context: int,
    change: Callable[[onnx_ir.Graph], None] | None,
) -> onnx_ir.Model:
    program = repeat(_traced_once(decoder, layers, context, change is None), layers)
    if change is not None:
        change(program.graph)
    fuse_between_layers(program.graph)
    return program


def _traced_once(
    decoder: ShippedDecoder, layers: Layers, context: int, join: bool
) -> onnx_ir.Model:
    """Trace and fuse a skeleton; decoders of one shape, as those of a run are, share the work."""
    small = skeleton(decoder.whole.config, layers)
    key = (shape_of(small, layers, decoder.forms), context, join)
    traced = _TRACED.get(key)
    if traced is None:
        traced = trace(small, decoder, layers, context)
        fuse_inside_layers(traced.graph, join=join)
        while len(_TRACED) >= _MOST:
            _TRACED.popitem(last=False)
        _TRACED[key] = traced
    return traced.clone()


def save(program: onnx_ir.Model, decoder: ShippedDecoder, directory: Path) -> None:
    """Write a graph, and its weights in a file beside it."""
    import onnx_ir

    write_weights(program.graph, decoder.weights, directory / WEIGHTS)
    onnx_ir.save(program, directory / GRAPH)


def describe(program: onnx_ir.Model, decoder: ShippedDecoder) -> dict[str, Any]:
    """Manifest entries for a graph."""
    operators = Counter(node.op_type for node in program.graph)
    lookups = [form for form in decoder.forms.values() if form.startswith("rows")]
    return {
        "backend": "onnxruntime cpu",
        "linears_quantized": len(decoder.forms) - len(lookups),
        "embeddings_quantized": len(lookups),
        "operators": dict(sorted(operators.items())),
    }


def genai_config(
    model: PreTrainedModel,
    context: int,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """The ``genai_config.json`` of a graph; its model type ``decoder`` fits any decoder."""
    config = model.config.get_text_config()
    ends = eos_ids(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    kv_heads, head_size = cache_shape(model.config)
    session = {
        "log_id": "onnxruntime-genai",
        "provider_options": [],
        "intra_op_num_threads": THREADS,
        "session.intra_op.allow_spinning": "0",
    }
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
                    "input_ids": TOKENS,
                    "attention_mask": MASK,
                    "position_ids": POSITIONS,
                    "past_key_names": PAST[0],
                    "past_value_names": PAST[1],
                },
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": PRESENT[0],
                    "present_value_names": PRESENT[1],
                },
            },
        },
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": True},
    }
