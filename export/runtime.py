"""XXX."""

from __future__ import annotations

RUNTIMES = ("executorch", "onnx")
