"""The ONNX graph of a decoder: traced, fused, its layers repeated, its weights written."""
