"""Compute result shapes of torchao's quantization operators without running them on fake tensors.

Upstream: torchao 0.18, ``torch.ops.torchao.choose_qparams_affine``, ``quantize_affine`` and
``dequantize_affine``. Each is a composite of a dozen operators, and all of them run, with symbolic
sizes, whenever one is interpreted under fake tensors.

With another release the patch is skipped: lowering takes longer and gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from caliport.core.patching import is_tested

RELEASES = ("torchao==0.18.*", "torch==2.13.*")
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


@contextmanager
def affine_shapes() -> Iterator[None]:
    """While the body runs, the three operators compute fake results from shapes only."""
    with ExitStack() as stack:
        if is_tested(RELEASES):
            for name, fake in _FAKES.items():
                stack.enter_context(_fake(name, fake))
        yield


@contextmanager
def _fake(name: str, fake: Callable[[dict[str, Any]], Any]) -> Iterator[None]:
    """Compute ``torchao::name`` on fake tensors with ``fake``, unless that returns None."""
    operator = getattr(torch.ops.torchao, name).default
    arguments = operator._schema.arguments
    names = [argument.name for argument in arguments]
    defaults = {argument.name: argument.default_value for argument in arguments}

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        result = fake(given) if type(given["input"]) is FakeTensor else None
        return operator._op_dk(_COMPOSITE, *args, **kwargs) if result is None else result

    assert _COMPOSITE not in operator.py_kernels, "torchao 0.18 registers none"
    operator.py_kernels[_COMPOSITE] = kernel
    operator._dispatch_cache.clear()
    try:
        yield
    finally:
        del operator.py_kernels[_COMPOSITE]
        operator._dispatch_cache.clear()


def _fake_qparams(given: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """A scale and a zero point per token; None for any other granularity."""
    tensor = given["input"]
    per_token = [*([1] * (tensor.dim() - 1)), tensor.shape[-1]]
    if given["keepdim"] or list(given["block_size"]) != per_token:
        return None
    scale = tensor.new_empty(tensor.shape[:-1], dtype=given["scale_dtype"] or tensor.dtype)
    return scale, torch.empty_like(scale, dtype=given["zero_point_dtype"] or torch.int32)


def _fake_quantized(given: dict[str, Any]) -> Tensor:
    return torch.empty_like(given["input"], dtype=given["output_dtype"])


# The schema's default is a number, 6, which torch reads as float32.
def _fake_dequantized(given: dict[str, Any]) -> Tensor:
    dtype = given["output_dtype"]
    return torch.empty_like(given["input"], dtype=torch.float32 if dtype == 6 else dtype)


_FAKES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "choose_qparams_affine": _fake_qparams,
    "quantize_affine": _fake_quantized,
    "dequantize_affine": _fake_dequantized,
}
