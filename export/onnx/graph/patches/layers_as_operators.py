"""Make linear layers, embeddings and norms emit ONNX Runtime's own operators while being traced.

Upstream: torch 2.13, ``torch.onnx.export``. It translates products, lookups and norms into standard
operators, and for quantized layers ONNX Runtime 1.31 does not fuse these into operators with fast
kernels. Here layers emit the fast operators directly, over stand-ins for the tensors that ship, so
no pattern has to be matched in the traced graph. The modelling code is Hugging Face's own.

Without the patch a graph would contain zeros. With another release, export fails with an error.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from caliport.core.patching import check_tested, swapped, swapped_here
from caliport.export.onnx.graph.layouts import Layout
from caliport.export.onnx.graph.operators import OURS, symbolic

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RELEASES = ("torch==2.13.*",)
# accuracy_level 4: MatMulNBits multiplies in 8-bit integers; by default it multiplies in float32.
_INT8_ACTIVATIONS = 4


@contextmanager
def layers_as_operators(model: PreTrainedModel) -> Iterator[None]:
    """While the body runs, a furnished skeleton computes with ONNX Runtime's operators.

    Raises:
        InputError: The installed release was not tested with this patch.
    """
    check_tested(RELEASES)
    lookup = _lookup(nn.Embedding.forward)
    with ExitStack() as stack:
        stack.enter_context(swapped_here(nn.Linear, "forward", _linear))
        stack.enter_context(swapped_here(nn.Embedding, "forward", lookup))
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
    """0 for a root-mean-square norm, 1 for one that adds 1 to its weight, None for anything else.

    Found by comparing outputs with x / sqrt(mean(x^2) + eps) · (weight + offset), since every model
    family has its own class. Source: https://arxiv.org/abs/1910.07467.
    """
    weight = getattr(module, "weight", None)
    epsilon = _epsilon(module)
    if weight is None or weight.dim() != 1 or epsilon is None or list(module.children()):
        return None
    if "RMSNorm" not in type(module).__name__ or len(list(module.parameters())) != 1:
        return None
    draw = torch.Generator().manual_seed(0)
    trial = torch.rand(weight.shape, generator=draw)
    # Small values, so that epsilon makes a difference.
    x = torch.randn(2, 3, len(weight), generator=draw) * epsilon**0.5
    with torch.no_grad():
        found = torch.func.functional_call(module, {"weight": trial}, (x,))
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    for offset in (0.0, 1.0):
        if torch.allclose(found, normed * (trial + offset), atol=1e-6, rtol=1e-5):
            return offset
    return None
