"""A bundle's directory: one quantized base, and every composition beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from caliport.core.directories import content_hash
from caliport.core.errors import InputError
from caliport.export.executorch.lower import is_method
from caliport.export.quantization.choices import Quantization


def bundle_inputs(
    base: str | Path, compositions: Mapping[str, Path], adapters: Mapping[str, Path]
) -> dict[str, Path | str]:
    """What a bundle is made from, by the labels in its manifest."""
    inputs: dict[str, Path | str] = {"base": base}
    inputs |= {f"composition {name}": path for name, path in compositions.items()}
    return inputs | {f"adapter {name}": path for name, path in adapters.items()}


def hashed(inputs: Mapping[str, Path | str]) -> dict[str, str]:
    """Content hashes of inputs; a name that is no path, such as one on a hub, stands for itself."""
    return {
        label: content_hash(Path(path)) if Path(path).exists() else f"name:{path}"
        for label, path in inputs.items()
    }


def bundle_settings(runtime: str, how: Quantization, context: int | None) -> dict[str, Any]:
    """What decides a bundle beside its inputs, for its manifest."""
    return {"runtime": runtime, "bundle": True, "context": context, **asdict(how)}


def check_names(runtime: str, compositions: Mapping[str, Path]) -> None:
    """Check the names of compositions, which become names of methods or files.

    Raises:
        InputError: None at all, or a name that is none.
    """
    if not compositions:
        raise InputError("bundle: found no composition, expected at least one NAME=DIR")
    for name in compositions:
        if runtime == "executorch" and not is_method(name):
            raise InputError(
                f"bundle: found the name {name!r}, expected letters, digits and _ (not forward)"
            )
        if runtime == "onnx":
            from caliport.export.onnx.lower import check_name

            check_name(name)
