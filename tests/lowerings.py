"""What a process keeps of the decoders that it has lowered, for both runtimes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def lowerings() -> list[Any]:
    """The modules that keep a decoder's trace for others of its shape."""
    from caliport.export.executorch import lower as executorch
    from caliport.export.onnx import lower as onnx

    return [executorch, onnx]


def _kept() -> list[OrderedDict[Any, Any]]:
    executorch, onnx = lowerings()
    return [executorch._LOWERED, onnx._TRACED]


@contextmanager
def lowered_anew() -> Iterator[None]:
    """Lower every decoder anew in the body and keep none of it; what was kept before stays."""
    before = [kept.copy() for kept in _kept()]
    for kept in _kept():
        kept.clear()
    try:
        yield
    finally:
        for kept, old in zip(_kept(), before, strict=True):
            kept.clear()
            kept.update(old)
