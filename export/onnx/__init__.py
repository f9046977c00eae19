"""ONNX Runtime: trace, fuse, repeat layers, write the graph and its weights."""
