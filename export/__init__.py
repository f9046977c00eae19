"""Composed adapter in, .pte and .onnx out: fold, quantize, lower."""
