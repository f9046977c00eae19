"""XXX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

from caliport.core.directories import MANIFEST
from caliport.core.progress import working
from caliport.export.bundle import bundle_inputs, bundle_settings, check_names
from caliport.export.quantization.choices import Quantization
from caliport.stages.stage import hashes_of, stage


def export_to(
    out: Path,
    title: str,
    base: str | Path,
    adapter: Path | None,
    runtime: str,
    how: Quantization,
    context: int | None,
    *,
    preflight: bool = True,
) -> None:
    """Export one artifact, unless it is up to date.

    ``preflight=False`` goes on where memory or disk seem too small.
    """

    def fill_it(partial: Path, extra: dict[str, Any]) -> None:
        from caliport.export.artifact import fill

        fill(partial, extra, base, runtime, adapter, how, context)

    adapters = [] if adapter is None else [adapter]
    inputs = {"base": base} | ({} if adapter is None else {"adapter": adapter})
    settings = {"runtime": runtime, "context": context, **asdict(how)}

    def say_needs() -> None:
        _say_needs(base, adapters, runtime, how, out, refuse=preflight, context=context)

    _made(out, title, inputs, settings, say_needs, fill_it)


def bundle_to(
    out: Path,
    title: str,
    base: str | Path,
    compositions: Mapping[str, Path],
    shared: Mapping[str, Path],
    runtime: str,
    how: Quantization,
    context: int | None,
    *,
    preflight: bool = True,
) -> None:
    """Export one base with all compositions beside it, unless it is up to date.

    Args:
        out: The directory.
        title: What to tell the user.
        base: A Hugging Face directory or hub name.
        compositions: PEFT LoRA directories by name.
        shared: For ExecuTorch, single-task adapters by name, to be stored once.
        runtime: ``executorch`` or ``onnx``.
        how: How the base is quantized.
        context: Tokens of the cache; None for the base's own maximum.
        preflight: Stop where memory or disk seem too small.

    Raises:
        InputError: See ``export.to_executorch_bundle`` and ``export.to_onnx_bundle``.
    """
    check_names(runtime, compositions)

    def fill_it(partial: Path, extra: dict[str, Any]) -> None:
        from caliport.export.executorch import bundle as executorch_bundle
        from caliport.export.onnx import bundle as onnx_bundle

        if runtime == "onnx":
            onnx_bundle.fill_bundle(partial, extra, base, compositions, how, context)
        else:
            executorch_bundle.fill_bundle(partial, extra, base, compositions, shared, how, context)

    def say_needs() -> None:
        given = list(compositions.values()), list(shared.values())
        _say_needs(
            base, given[0], runtime, how, out, refuse=preflight, context=context, shared=given[1]
        )

    inputs = bundle_inputs(base, compositions, shared)
    _made(out, title, inputs, bundle_settings(runtime, how, context), say_needs, fill_it)


def _made(
    out: Path,
    title: str,
    inputs: Mapping[str, Path | str],
    settings: Mapping[str, Any],
    say_needs: Callable[[], None],
    fill_it: Callable[[Path, dict[str, Any]], None],
) -> None:
    """Make an artifact unless it is up to date, and say before what that needs."""
    # Say what is needed before any work, but not of what may be skipped.
    may_be_skipped = (out / MANIFEST).is_file()
    if not may_be_skipped:
        hashing = Thread(target=_hash_ahead, args=(inputs,), daemon=True)
        hashing.start()
        say_needs()
        hashing.join()

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        if may_be_skipped:
            say_needs()
        with working(title):
            fill_it(partial, extra)

    # No times in an artifact: the same inputs give the same bytes.
    stage(out, "export", title, inputs, settings, build, timed=False)


def _hash_ahead(inputs: Mapping[str, Path | str]) -> None:
    """Hash inputs while libraries are imported, for ``stage``, which tells what is wrong with one.

    In a daemon thread: a refusal must not wait until all of a large base has been read.
    """
    with suppress(Exception):
        hashes_of(inputs)


def _say_needs(*given: Any, **more: Any) -> None:
    from caliport.export.preflight import preflight

    preflight(*given, **more)
