"""Composed adapter in, .pte and .onnx out: fold, quantize, lower."""

from export.artifact import to_executorch, to_onnx

__all__ = ["to_executorch", "to_onnx"]
