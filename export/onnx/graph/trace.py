"""Trace a decoder's skeleton to a graph of ONNX Runtime operators."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

import torch

from caliport.core.errors import InputError, one_line
from caliport.core.patching import quiet
from caliport.export.decoder.parts import cache_shape
from caliport.export.decoder.skeleton import Layers, marked
from caliport.export.onnx.graph.decoder import Decoder
from caliport.export.onnx.graph.operators import furnish, mark
from caliport.export.onnx.graph.patches import check_releases
from caliport.export.onnx.graph.patches.layers_as_operators import layers_as_operators
from caliport.export.onnx.graph.rotary import Rotary

if TYPE_CHECKING:
    import onnx_ir
    from transformers import PreTrainedModel

    from caliport.export.decoder.shipped import ShippedDecoder

TOKENS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"


def trace(
    small: PreTrainedModel, decoder: ShippedDecoder, layers: Layers, context: int
) -> onnx_ir.Model:
    """Trace a skeleton to a graph with marks between its layers.

    Weights are the last inputs, named as in ``Weights``; a quantized layer has ``name.qdata`` and
    ``name.scale`` instead of ``name.weight``. Each product and lookup is a node with the name of
    its layer.

    Args:
        small: The skeleton, before it is furnished.
        decoder: The whole decoder.
        layers: Which of its layers the skeleton has.
        context: Maximum number of tokens.

    Raises:
        InputError: torch.onnx cannot translate the model, its caches are not used, or an installed
            release was not tested with the patches.
    """
    check_releases()
    model = furnish(small, layers, decoder)
    try:
        # torch.onnx 2.13 prints its progress.
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            program = torch.onnx.export(_exported(model, layers, context), optimize=False)
    except InputError:
        raise
    except Exception as error:
        reason = one_line(error)
        raise InputError(
            f"{type(model).__name__}: torch.onnx cannot trace it ({reason})"
        ) from error
    assert program is not None
    _check_signature(program.model.graph, len(layers.kept))
    _strip(program.model)
    _free_weights(program.model.graph)
    from onnxscript.optimizer import optimize_ir

    with quiet():
        optimize_ir(program.model)
    return program.model


def _exported(model: PreTrainedModel, layers: Layers, context: int) -> torch.export.ExportedProgram:
    heads, head_size = cache_shape(model.config)
    # torch.export would treat sizes of 0 and 1 as constants.
    caches = [torch.zeros(1, heads, 3, head_size) for _ in range(2 * len(layers.kept))]
    inputs: dict[str, Any] = {
        TOKENS: torch.zeros(1, 2, dtype=torch.long),
        MASK: torch.ones(1, 5, dtype=torch.long),
        POSITIONS: torch.tensor([[3, 4]]),
        "past": caches,
    }
    count = torch.export.Dim("n", min=1, max=context)
    total = torch.export.Dim("total", min=1, max=context)
    past = torch.export.Dim("past", min=0, max=context)
    shapes = {
        TOKENS: {1: count},
        MASK: {1: total},
        POSITIONS: {1: count},
        "past": [{2: past}] * len(caches),
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(layers_as_operators(model))
        if layers.path:
            stack.enter_context(marked(model, layers.path, mark))
        return torch.export.export(
            Decoder(model, Rotary(model, context)).eval(),
            (),
            inputs,
            dynamic_shapes=shapes,
            strict=False,
        )


def _check_signature(graph: onnx_ir.Graph, layers: int) -> None:
    inputs, outputs = len(graph.inputs), len(graph.outputs)
    if (inputs, outputs) != (3 + 2 * layers, 1 + 2 * layers):
        raise InputError(
            f"the traced graph has {inputs} inputs and {outputs} outputs, expected "
            f"{3 + 2 * layers} and {1 + 2 * layers}: a key and a value of each layer"
        )


def _strip(program: onnx_ir.Model) -> None:
    """Drop metadata that tracing adds, such as stack traces, which contain local file names."""
    graph = program.graph
    program.metadata_props.clear()
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def _free_weights(graph: onnx_ir.Graph) -> None:
    """Turn stand-ins into inputs, so that no pass uses their zeros as values."""
    for name, value in list(graph.initializers.items()):
        kind = value.metadata_props.get(_KIND)
        value.metadata_props.clear()
        if kind == "PARAMETER":
            del graph.initializers[name]
            value.const_value = None
            if value.uses():
                value.name = name.removeprefix("model.")
                graph.inputs.append(value)
    for value in graph.inputs:
        value.metadata_props.clear()
    for node in graph:
        data = next((v for v in node.inputs if v is not None and _is_data(v)), None)
        if data is not None and data.name is not None:
            node.name = data.name.rpartition(".")[0]


def _is_data(value: onnx_ir.Value) -> bool:
    return value.name is not None and value.name.endswith((".qdata", ".weight"))
