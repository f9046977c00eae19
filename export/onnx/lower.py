"""Lower a decoder to an ONNX graph for ONNX Runtime on CPU, as onnxruntime_genai expects it.

A skeleton of the decoder is traced (``caliport.export.onnx.trace``) and its layers are repeated
(``caliport.export.onnx.repeat``); weights come in last, from files
(``caliport.export.onnx.weights``). One graph serves prefill, chunks and single steps: it takes any
number of tokens after any number of cached ones.

Quantized products are ``MatMulNBits`` in 8 bits as well as in 4. The other 8-bit form,
``DynamicQuantizeLinear`` with ``MatMulInteger``, was measured with ONNX Runtime 1.31 on x86 with
AVX2, on 2048 x 2048 weights over the whole range of 8 bits and an input with an outlier. It is a
third faster on one token and three times on 128, but was up to 90 % wrong, since AVX2 adds pairs
of 8-bit products in 16 bits and saturates. It also shares one activation scale among all tokens,
so that a prefill would not equal the same tokens one by one. ``MatMulNBits`` was 0.9 to 1.5 % off
there, which is the rounding of its input alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.checkpoints import eos_ids
from caliport.export.decoder.parts import cache_shape
from caliport.export.decoder.shipped import ShippedDecoder, every, group
from caliport.export.decoder.skeleton import CannotRepeat
from caliport.export.onnx.files import GENAI_CONFIG, GRAPH, WEIGHTS
from caliport.export.onnx.fuse import fuse_between_layers, fuse_inside_layers
from caliport.export.onnx.repeat import PAST, PRESENT, repeat
from caliport.export.onnx.trace import LOGITS, MASK, POSITIONS, TOKENS, trace
from caliport.export.onnx.weights import write_weights

if TYPE_CHECKING:
    import onnx_ir
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from caliport.export.decoder.skeleton import Layers

THREADS = 4
"""Written into ``genai_config.json``: as many as a phone has quick cores.

ONNX Runtime's own choice is one a physical core, which counts a phone's slow cores in and takes one
of two hyper-threads. More threads than cores cost little where waiting threads sleep, so
``session.intra_op.allow_spinning`` is 0: at 1.24 B in int4 on 2 hyper-threads of an AMD EPYC this
decodes at 0.90 of the rate of 2 spinning threads, 4 spinning ones at 0.4, 1 at 0.55."""


def lower(
    decoder: ShippedDecoder,
    directory: Path,
    context: int,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Write ``model.onnx``, its weights ``model.onnx.data`` and ``genai_config.json``.

    The graph takes ``input_ids`` and ``position_ids`` int64 [1, n], ``attention_mask`` int64
    [1, past + n] of ones, and per layer a key and a value float32 [1, kv heads, past, head size];
    it gives ``logits`` float32 [1, 1, vocab] of the last token and the longer caches. n >= 1,
    past >= 0, past + n <= context. Past and present may be one buffer of any larger size. Positions
    must be those of the tokens, past … past + n - 1: attention that turns queries and keys by
    itself counts them so.

    Args:
        decoder: Its weights as they ship, and what they are the weights of.
        directory: Where to; must exist.
        context: Most tokens, prompt and answer together.
        tokenizer: Gives the special tokens' ids that the model's settings do not.

    Returns:
        Manifest entries: how many of each operator, quantized layers.

    Raises:
        InputError: The model cannot be exported this way. Nothing is left behind where
            ``directory`` is one of ``new_directory``.
    """
    program = graph_of(decoder, context)
    save(program, decoder, directory)
    config = genai_config(decoder.whole, context, tokenizer)
    (directory / GENAI_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return describe(program, decoder)


def graph_of(
    decoder: ShippedDecoder, context: int, change: Callable[[onnx_ir.Graph], None] | None = None
) -> onnx_ir.Model:
    """The graph of a decoder, its weights still inputs after the others.

    Args:
        decoder: What to trace.
        context: Most tokens.
        change: Called with the graph of all layers while each linear layer still is a product of
            its own, with the layer's name; None joins those that attention reads.
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
    skeleton = trace(decoder, layers, context)
    fuse_inside_layers(skeleton.graph, join=change is None)
    program = repeat(skeleton, layers)
    if change is not None:
        change(program.graph)
    fuse_between_layers(program.graph)
    return program


def save(program: onnx_ir.Model, decoder: ShippedDecoder, directory: Path) -> None:
    """Write a graph and, beside it, its weights."""
    import onnx_ir

    write_weights(program.graph, decoder.weights, directory / WEIGHTS)
    onnx_ir.save(program, directory / GRAPH)


def describe(program: onnx_ir.Model, decoder: ShippedDecoder) -> dict[str, Any]:
    """Manifest entries of a graph."""
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
    """What onnxruntime_genai asks about a graph; its type ``decoder`` is any decoder."""
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
