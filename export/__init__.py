"""Composed adapter in, .pte and .onnx out: fold or bundle, quantize, lower."""

from export.artifact import to_executorch, to_onnx
from export.bundling import to_executorch_bundle
from export.onnx_bundle import to_onnx_bundle

__all__ = ["to_executorch", "to_executorch_bundle", "to_onnx", "to_onnx_bundle"]
