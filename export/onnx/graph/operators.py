"""Stand-ins for the tensors of ONNX Runtime's operators, and nodes of these operators.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from caliport.export.decoder.skeleton import Layers, stand_in
from caliport.export.onnx.graph.layouts import Layout, lookup_layout, product_layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from caliport.export.decoder.shipped import ShippedDecoder

MARK = "Boundary"
OURS = "caliport"


def furnish(model: PreTrainedModel, layers: Layers, decoder: ShippedDecoder) -> PreTrainedModel:
    """Give a skeleton stand-ins for the tensors that ship, in place.

    Quantized linear layers and embeddings also get ``qdata`` and ``scale`` in the layout of their
    operators.
    """
    layouts = _layouts(decoder)
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            _give(module, key, stand_in(tuple(parameter.shape), torch.float32))
        layout = layouts.get(layers.whole_name(name))
        if layout is not None:
            _give(module, "qdata", stand_in(layout.data_shape, torch.uint8))
            _give(module, "scale", stand_in(layout.scale_shape, torch.float32))
            module.layout = layout
    return model


def _give(module: nn.Module, key: str, value: Tensor) -> None:
    setattr(module, key, nn.Parameter(value, requires_grad=False))


def _layouts(decoder: ShippedDecoder) -> dict[str, Layout]:
    """How each quantized layer of the whole decoder is stored."""
    found: dict[str, Layout] = {}
    products: dict[tuple[int, str], Layout] = {}  # by the parameter, and its form
    for name, form in decoder.forms.items():
        if not form.startswith("rows"):
            module = decoder.whole.get_submodule(name)
            assert isinstance(module, nn.Linear)
            layout = product_layout(module.out_features, module.in_features, form)
            found[name] = layout
            products[id(module.weight), f"rows {form}"] = layout
    for name, form in decoder.forms.items():
        if form.startswith("rows"):
            module = decoder.whole.get_submodule(name)
            assert isinstance(module, nn.Embedding)
            tied = products.get((id(module.weight), form))
            found[name] = lookup_layout(module.num_embeddings, module.embedding_dim, form, tied)
    return found


def symbolic(name: str, inputs: tuple[Tensor | None, ...], shape: Any, **attributes: Any) -> Tensor:
    """Add a node with one float32 output to the traced graph."""
    return torch.onnx.ops.symbolic(
        name, inputs, attributes, dtype=torch.float32, shape=shape, version=1
    )


def mark(hidden: Tensor, layer: int) -> Tensor:
    """Add a node that marks where a layer begins (``caliport.export.decoder.skeleton.marked``)."""
    return symbolic(f"{OURS}::{MARK}", (hidden,), hidden.shape, layer=layer)
