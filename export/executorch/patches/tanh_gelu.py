"""Write GELU's tanh form as basic operators while a decoder is traced.

Upstream: executorch 1.5.1, ``executorch.backends.xnnpack.operators.op_gelu`` ignores the operator's
``approximate``: XNNPACK computes the exact form instead of the tanh form. The two differ by up to
5e-4.

With another release, export fails with an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from caliport.core.patching import check_tested

RELEASES = ("executorch==1.5.*", "torch==2.13.*")


@contextmanager
def tanh_gelu() -> Iterator[None]:
    """While the body runs, x/2 (1 + tanh z) is computed as x · sigmoid(2z), in this thread.

    z = √(2/π) (x + 0.044715 x³). Source: https://arxiv.org/abs/1606.08415.

    Raises:
        InputError: The installed release was not tested with this patch.
    """
    check_tested(RELEASES)
    with _WrittenOut():
        yield


class _WrittenOut(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.gelu or kwargs.get("approximate") != "tanh":
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        slope = 2 * math.sqrt(2 / math.pi)
        return x * torch.sigmoid(x * (x * x * (0.044715 * slope) + slope))
