"""Names of the files of an ONNX artifact that only its runtimes read."""

GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
GENAI_CONFIG = "genai_config.json"
