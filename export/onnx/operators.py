"""What a decoder's layers become while it is traced for ONNX: ONNX Runtime's own operators.

The modelling code stays Hugging Face's own. Linear layers, embeddings and norms of it emit the
operators that ONNX Runtime has kernels for, over stand-ins of the tensors that ship, so that
nothing has to be found again in the traced graph. Sources:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from caliport.core.patching import swapped
from caliport.export.decoder.skeleton import Layers, stand_in
from caliport.export.onnx.layouts import Layout, lookup_layout, product_layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from caliport.export.decoder.shipped import ShippedDecoder

MARK = "Boundary"
OURS = "caliport"
# The level that lets MatMulNBits multiply in 8-bit integers; without it, it multiplies in float32.
_INT8_ACTIVATIONS = 4


def furnish(model: PreTrainedModel, layers: Layers, decoder: ShippedDecoder) -> PreTrainedModel:
    """Give a skeleton stand-ins of the tensors that ship, in place.

    Quantized linear layers and embeddings also get ``qdata`` and ``scale`` as their operators
    read them.
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


@contextmanager
def as_operators(model: PreTrainedModel) -> Iterator[None]:
    """While the body runs, a furnished skeleton computes with ONNX Runtime's operators."""
    with ExitStack() as stack:
        stack.enter_context(swapped(nn.Linear, "forward", _linear))
        stack.enter_context(swapped(nn.Embedding, "forward", _lookup(nn.Embedding.forward)))
        for module in model.modules():
            offset = _norm_offset(module)
            if offset is not None:
                stack.enter_context(swapped(module, "forward", _norm(module, offset)))
        yield


def _linear(self: nn.Linear, input: Tensor) -> Tensor:
    shape = [*input.shape[:-1], self.out_features]
    if isinstance(getattr(self, "layout", None), Layout):
        layout: Any = self.layout
        data: Any = self.qdata
        scale: Any = self.scale
        return symbolic(
            "com.microsoft::MatMulNBits",
            (input, data, scale, None, None, self.bias),
            shape,
            K=layout.columns,
            N=layout.rows,
            bits=layout.bits,
            block_size=layout.block,
            accuracy_level=_INT8_ACTIVATIONS,
        )
    out = symbolic("com.microsoft::FusedMatMul", (input, self.weight), shape, transB=1)
    return out if self.bias is None else out + self.bias


def _lookup(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: nn.Embedding, input: Tensor) -> Tensor:
        if not isinstance(getattr(self, "layout", None), Layout):
            return plain(self, input)
        layout: Any = self.layout
        data: Any = self.qdata
        scale: Any = self.scale
        return symbolic(
            "com.microsoft::GatherBlockQuantized",
            (data, input, scale),
            [*input.shape, layout.columns],
            bits=layout.bits,
            block_size=layout.block,
            gather_axis=0,
            quantize_axis=1,
        )

    return forward


def symbolic(name: str, inputs: tuple[Tensor | None, ...], shape: Any, **attributes: Any) -> Tensor:
    """A node of one float32 output in the traced graph."""
    return torch.onnx.ops.symbolic(
        name, inputs, attributes, dtype=torch.float32, shape=shape, version=1
    )


def mark(hidden: Tensor, layer: int) -> Tensor:
    """A node that marks where a layer begins (``caliport.export.decoder.skeleton.marked``)."""
    return symbolic(f"{OURS}::{MARK}", (hidden,), hidden.shape, layer=layer)


def _norm(module: nn.Module, offset: float) -> Callable[[Tensor], Tensor]:
    def forward(hidden_states: Tensor) -> Tensor:
        weight: Any = module.weight
        return symbolic(
            f"{OURS}::SimplifiedLayerNormalization",
            (hidden_states, weight + offset if offset else weight),
            hidden_states.shape,
            axis=-1,
            epsilon=float(_epsilon(module) or 0.0),
            stash_type=1,
        )

    return forward


def _epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def _norm_offset(module: nn.Module) -> float | None:
    """0 for a root-mean-square norm, 1 for one that adds 1 to its weight, None for all else.

    Found by trial, x / sqrt(mean(x^2) + eps) · (weight + offset), since every family has a class
    of its own. Source: https://arxiv.org/abs/1910.07467.
    """
    weight = getattr(module, "weight", None)
    epsilon = _epsilon(module)
    if weight is None or weight.dim() != 1 or epsilon is None or list(module.children()):
        return None
    if "RMSNorm" not in type(module).__name__ or len(list(module.parameters())) != 1:
        return None
    draw = torch.Generator().manual_seed(0)
    trial = torch.rand(weight.shape, generator=draw)
    # Small values, so that epsilon shows.
    x = torch.randn(2, 3, len(weight), generator=draw) * epsilon**0.5
    with torch.no_grad():
        found = torch.func.functional_call(module, {"weight": trial}, (x,))
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    for offset in (0.0, 1.0):
        if torch.allclose(found, normed * (trial + offset), atol=1e-6, rtol=1e-5):
            return offset
    return None
