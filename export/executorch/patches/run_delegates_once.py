"""Compute a delegate's fake results once for inputs of the same shapes.

Upstream: executorch 1.5.1 with torch 2.13, the fake implementation of
``torch._higher_order_ops.executorch_call_delegate``. Whenever a graph with delegates is interpreted
under fake tensors, the graph that a delegate was made from is built and run again, in every layer
of every method.

With another release the patch is skipped: lowering takes longer and gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from caliport.core.patching import is_tested

RELEASES = ("executorch==1.5.*", "torch==2.13.*")


@contextmanager
def run_delegates_once() -> Iterator[None]:
    """While the body runs, a delegate runs once for fake inputs of the same shapes and types."""
    if not is_tested(RELEASES):
        yield
        return
    from torch._higher_order_ops.executorch_call_delegate import executorch_call_delegate
    from torch._higher_order_ops.utils import registered_hop_fake_fns

    functions = cast("dict[Any, Callable[..., Any]]", registered_hop_fake_fns)
    plain = functions[executorch_call_delegate]
    found: dict[Hashable, Any] = {}
    held: dict[int, Any] = {}  # keeps objects alive whose id is in a key: ids must not be reused

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
