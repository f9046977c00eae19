"""XXX."""

from __future__ import annotations

from pathlib import Path

from caliport.core.directories import MANIFEST, read_manifest
from caliport.core.errors import InputError
from caliport.validation.runners.runner import RUNTIMES


def form_of(runtime: str, precision: str, bundle: bool) -> str:
    """Names an artifact, or one part of a bundle, within its composition."""
    return f"{runtime}-{precision}{'-bundle' if bundle else ''}"


def is_foreign(directory: Path) -> bool:
    """Whether a directory holds a program that no manifest of ours vouches for."""
    there = (directory / "genai_config.json").is_file() or any(directory.glob("*.pte"))
    return there and not (directory / MANIFEST).is_file()


def artifact_form(directory: Path) -> tuple[str, str]:
    """Runtime and precision of an artifact, from its manifest.

    Without a manifest, a directory with a ``genai_config.json`` or a ``.pte`` is another tool's, of
    the precision ``unknown``.

    Raises:
        InputError: Nothing that can be run, or a manifest without a known runtime and precision.
    """
    if is_foreign(directory):
        onnx = (directory / "genai_config.json").is_file()
        return "onnx" if onnx else "executorch", "unknown"
    manifest = read_manifest(directory)
    runtime, precision = manifest.get("runtime"), manifest.get("precision")
    if runtime not in RUNTIMES:
        raise InputError(
            f"{directory}/manifest.json: runtime is {runtime!r}, expected executorch or onnx"
        )
    if not isinstance(precision, str):
        raise InputError(
            f"{directory}/manifest.json: precision is {precision!r}, expected fp32, int8 or int4"
        )
    return runtime, precision


def compositions_of(directory: Path) -> tuple[str, ...] | None:
    """Names of the compositions of a bundle; None for an artifact that is none.

    Raises:
        InputError: No manifest.
    """
    if is_foreign(directory):
        return None
    bundle = read_manifest(directory).get("bundle")
    return None if bundle is None else tuple(bundle["compositions"])


def _adapter_file(directory: Path, bundled: str | None) -> Path | None:
    if bundled is None:
        return None
    known = read_manifest(directory).get("bundle", {}).get("compositions", {})
    if bundled not in known:
        listed = ", ".join(known) or "none"
        raise InputError(f"{directory}: has no composition {bundled!r}, expected one of {listed}")
    return directory / str(known[bundled]["file"])
