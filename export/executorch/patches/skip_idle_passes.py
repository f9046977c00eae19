"""Lower several times faster, to the same bytes: leave out work that cannot change anything.

executorch 1.5.1 ends nearly every pass by interpreting the whole graph under fake tensors to renew
its metadata, also when the pass has changed nothing: sixteen times over for every delegate. Where
it comes by a delegate it builds the graph that the delegate was made from and runs that, in every
layer of every method. It traces reference graphs of attention and image scaling to look for them.
And torchao 0.18 computes the shape that a quantization has by running all its arithmetic on fake
tensors, every time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from caliport.core.patching import swapped

_TRACED = "caliport_traced"
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


@contextmanager
def fast_lowering() -> Iterator[None]:
    """While the body runs, lowering skips what has no effect on decoders of ours.

    - A pass over a graph that is as it was after the last trace returns it. A pass that overrides
      how nodes are interpreted always runs.
    - A delegate's fake results are computed once for inputs of the same shapes.
    - Plain attention and image scaling are not searched for: attention is one custom operator.
    - torchao's three affine operators give fake results by shape alone.

    A test compares the bytes of a program lowered with and without this.
    """
    from executorch.backends.xnnpack.partition.graphs import bilinear_2d, sdpa
    from executorch.exir.pass_base import ExportPass, _ExportPassBase

    with ExitStack() as stack:
        swap = swapped(_ExportPassBase, "call", _lazy(_ExportPassBase.call, ExportPass))
        stack.enter_context(swap)
        stack.enter_context(swapped(sdpa, "get_graphs", list))
        stack.enter_context(swapped(bilinear_2d, "get_graphs_dict", dict))
        for name, fake in _FAKES.items():
            stack.enter_context(_fake(name, fake))
        stack.enter_context(_delegates_once())
        yield


@contextmanager
def _delegates_once() -> Iterator[None]:
    """While the body runs, a delegate is not run again on fake inputs that look the same."""
    from torch._higher_order_ops.executorch_call_delegate import executorch_call_delegate
    from torch._higher_order_ops.utils import registered_hop_fake_fns

    functions = cast("dict[Any, Callable[..., Any]]", registered_hop_fake_fns)
    plain = functions[executorch_call_delegate]
    found: dict[Hashable, Any] = {}
    held: dict[int, Any] = {}  # what the keys have the id of

    def look(value: Any) -> Hashable:
        if not isinstance(value, FakeTensor):
            return type(value), str(value)
        held[id(value.fake_mode)] = value.fake_mode
        return id(value.fake_mode), value.dtype, str(value.shape), str(value.stride())

    def call(lowered: Any, *args: Any) -> Any:
        key = (id(lowered.original_module), *map(look, args))
        if key not in found:
            held[id(lowered.original_module)] = lowered.original_module
            found[key] = plain(lowered, *args)
        return tree_map_only(
            Tensor,
            lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device),
            found[key],
        )

    functions[executorch_call_delegate] = call
    try:
        yield
    finally:
        functions[executorch_call_delegate] = plain


def _lazy(trace: Callable[..., Any], base: type) -> Callable[..., Any]:
    """``ExportPass.call`` that leaves alone a graph which has not changed since its last trace."""
    from torch.fx.passes.infra.pass_base import PassResult

    def call(self: Any, graph_module: torch.fx.GraphModule) -> PassResult:
        traced = graph_module.meta.get(_TRACED)
        if not _interprets(type(self), base) and traced == _fingerprint(graph_module):
            return PassResult(graph_module, True)
        result = trace(self, graph_module)
        result.graph_module.meta[_TRACED] = _fingerprint(result.graph_module)
        return result

    return call


def _interprets(kind: type, base: type) -> bool:
    """Whether a pass changes what interpreting a graph gives, beyond rewriting it in ``call``."""
    return any(
        name != "call" and not name.startswith("__") and getattr(kind, name) is not member
        for name in dir(base)
        if callable(member := getattr(base, name))
    )


def _fingerprint(graph_module: torch.fx.GraphModule) -> list[tuple[Any, ...]]:
    return [
        (node.op, node.name, node.target, str(node.args), str(node.kwargs))
        for node in graph_module.graph.nodes
    ]


@contextmanager
def _fake(name: str, fake: Callable[[dict[str, Any]], Any]) -> Iterator[None]:
    """Answer ``torchao::name`` on fake tensors by ``fake``, where that returns something."""
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
