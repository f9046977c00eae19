"""Lower a decoder to an ONNX graph for ONNX Runtime on CPU, as onnxruntime_genai expects it."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from caliport_core.checkpoints import eos_ids
from caliport_core.errors import InputError
from export.onnx_weights import swap_weights
from export.quantize import dequantize, scheme
from export.quiet import quiet

if TYPE_CHECKING:
    import onnx_ir
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
GENAI_CONFIG = "genai_config.json"

_PAST = ("past_key_values.%d.key", "past_key_values.%d.value")
_PRESENT = ("present.%d.key", "present.%d.value")
_BITS = {"int8": 8, "int4": 4}


def lower(model, directory: Path, precision: str, context: int, tokenizer, threads=None) -> dict[str, Any]:
    traced = model if precision == "fp32" else dequantize(model)
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        program = _trace(traced, context)
    _name_caches(program.graph, model.config.num_hidden_layers)
    counts = {} if precision == "fp32" else swap_weights(program.graph, traced, model, _BITS[precision])
    import onnx_ir
    onnx_ir.save(program, directory / GRAPH, external_data=WEIGHTS)
    (directory / GENAI_CONFIG).write_text(json.dumps(_genai_config(model, context, tokenizer, threads), indent=2))
    return counts


def _trace(model: PreTrainedModel, context: int) -> onnx_ir.Model:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    tokens = torch.zeros(1, 5, dtype=torch.long)
    with torch.no_grad():
        cache = model(tokens[:, :3], use_cache=True).past_key_values
    count = torch.export.Dim("n", min=1, max=context)
    past = torch.export.Dim("past", min=0, max=context)
    inputs = {
        "input_ids": tokens[:, 3:],
        "position_ids": torch.tensor([[3, 4]]),
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": 1,
    }
    shapes = {
        "input_ids": {1: count},
        "position_ids": {1: count},
        "past_key_values": [{2: past}] * (2 * model.config.num_hidden_layers),
        "logits_to_keep": None,
    }
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, ort_fusions="cpu")
    return OnnxExporter().export(model, inputs, config).program


def _name_caches(graph, layers):
    for values, names, start in ((graph.inputs, _PAST, 2), (graph.outputs, _PRESENT, 1)):
        for i, v in enumerate(values[start:]):
            v.name = names[i % 2] % (i // 2)

def _genai_config(model, context, tokenizer, threads):
    config = model.config
    return {"model": {"type": "decoder", "bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos_ids(model), "pad_token_id": tokenizer.pad_token_id,
      "context_length": context, "vocab_size": config.vocab_size, "decoder": {"session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
       "filename": GRAPH, "head_size": getattr(config,"head_dim",None) or config.hidden_size//config.num_attention_heads, "hidden_size": config.hidden_size,
       "num_attention_heads": config.num_attention_heads, "num_hidden_layers": config.num_hidden_layers, "num_key_value_heads": config.num_key_value_heads,
       "inputs": {"input_ids":"input_ids","position_ids":"position_ids","past_key_names":_PAST[0],"past_value_names":_PAST[1]},
       "outputs": {"logits":"logits","present_key_names":_PRESENT[0],"present_value_names":_PRESENT[1]}}},
      "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": False}}
