"""Export a base and its adapters as .pte or .onnx: fold or bundle, quantize, lower.

The package is callable: ``caliport.export(base, out, runtime=…)`` calls ``api.export``.
"""

from __future__ import annotations

import sys
from inspect import signature
from types import ModuleType

from caliport.export.api import add_composition, export
from caliport.export.artifact import Artifact
from caliport.export.quantization.choices import Quantization
from caliport.export.request import Bundle

__all__ = ["Artifact", "Bundle", "Quantization", "add_composition", "export"]


class _Callable(ModuleType):
    __call__ = staticmethod(export)


sys.modules[__name__].__class__ = _Callable
__signature__ = signature(export)  # inspect drops the first parameter of a static __call__
