"""Build the ONNX runner and get the packages that this takes."""
