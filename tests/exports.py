"""Exports as tests ask for them: by keyword, the directory returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caliport.export.api import export
from caliport.export.quantization.choices import Quantization
from caliport.export.quantization.text import CalibrationText, PlainText
from caliport.export.request import Bundle
from tests.conftest import TEXTS


def exported(
    runtime: str,
    base: str | Path,
    out: Path,
    *,
    precision: str = "fp32",
    int8_layers: Sequence[str] = (),
    embedding_bits: int | None = None,
    cache_bits: int | None = None,
    **more: Any,
) -> Path:
    """``caliport.export`` with the parts of a ``Quantization`` as keywords."""
    how = Quantization(precision, tuple(int8_layers), embedding_bits, cache_bits)
    return export(base, out, runtime=runtime, precision=how, **more).directory


def text_of(directory: Path, times: int, tokens: int) -> CalibrationText:
    """Calibration text that repeats a few sentences."""
    path = directory / "text.txt"
    path.write_text("\n".join(TEXTS * times))
    return CalibrationText({"": PlainText(path)}, tokens)


def to_executorch(base: str | Path, out: Path, **more: Any) -> Path:
    return exported("executorch", base, out, **more)


def to_onnx(base: str | Path, out: Path, **more: Any) -> Path:
    return exported("onnx", base, out, **more)


def to_executorch_bundle(
    base: str | Path,
    compositions: Mapping[str, Path],
    out: Path,
    *,
    adapters: Mapping[str, Path] | None = None,
    **more: Any,
) -> Path:
    bundle = Bundle(compositions, adapters or {})
    return exported("executorch", base, out, bundle=bundle, **{"precision": "int4", **more})


def to_onnx_bundle(
    base: str | Path,
    compositions: Mapping[str, Path],
    out: Path,
    *,
    modules: Sequence[str] | None = None,
    **more: Any,
) -> Path:
    bundle = Bundle(compositions, modules=None if modules is None else tuple(modules))
    return exported("onnx", base, out, bundle=bundle, **{"precision": "int4", **more})
