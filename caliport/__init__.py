"""Caliport: compose LoRA adapters, export them to phones, and prove that accuracy survived.

    import caliport

    adapters = ["summarize", "translate_es"]
    caliport.compose("base", adapters, "both", method="lc++", data="both.jsonl")
    artifact = caliport.export("base", "art", runtime="onnx", adapter="both", precision="int4")
    assert caliport.validate(artifact, "base", "both").passed
    print(caliport.generate(artifact, "Anna and Tom meet on Friday."))

Nothing heavy is imported before it is used. ONNX Runtime and onnxruntime_genai send usage events
with an id of the machine, unless ``ORT_DISABLE_TELEMETRY`` is set before they are loaded; importing
this package sets it to 1, if it is not set.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from caliport import export as export
    from caliport.api import calibration_text, compose, generate, load
    from caliport.validation.api import validate

    __version__: str

__all__ = ["__version__", "calibration_text", "compose", "export", "generate", "load", "validate"]

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "calibration_text": "caliport.api",
    "compose": "caliport.api",
    "generate": "caliport.api",
    "load": "caliport.api",
    "validate": "caliport.validation.api",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "export":  # a package that can be called
        return import_module("caliport.export")
    if name == "__version__":
        from importlib.metadata import version

        return version("caliport")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
