"""Composed adapter in, .pte and .onnx out: fold or bundle, quantize, lower."""

from caliport.export.api import to_executorch, to_executorch_bundle, to_onnx, to_onnx_bundle

__all__ = ["to_executorch", "to_executorch_bundle", "to_onnx", "to_onnx_bundle"]
