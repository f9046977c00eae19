"""The artifacts of a run, and artifacts from flags."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from caliport.scoring import best_method
from caliport.workspace import Workspace, hashes_of, need, stage
from caliport_core.directories import MANIFEST
from caliport_core.progress import working
from export.artifact import Quantization
from export.bundling import bundle_inputs, bundle_settings, check_names

ALONE = "base alone"
"""What stands for a composition where a bundle's base is meant."""


@dataclass(frozen=True)
class Row:
    """What a recipe ships and validates: an artifact, or one part of a bundle.

    ``composition`` is ``ALONE`` for a bundle's base.
    """

    composition: str
    runtime: str
    precision: str
    artifact: Path
    bundle: bool = False

    @property
    def bundled(self) -> str | None:
        """The composition to run of a bundle."""
        return self.composition if self.bundle and self.composition != ALONE else None

    @property
    def form(self) -> str:
        """Names it within its composition."""
        return form_of(self.runtime, self.precision, self.bundle)


def form_of(runtime: str, precision: str, bundle: bool) -> str:
    """Names an artifact, or one part of a bundle, within its composition."""
    return f"{runtime}-{precision}{'-bundle' if bundle else ''}"


def rows_of(space: Workspace) -> Iterator[Row]:
    """All that a recipe ships, folded artifacts first."""
    recipe = space.recipe
    forms = [(r, p) for r in recipe.export.runtimes for p in recipe.export.precisions]
    if "fold" in recipe.export.ship:
        for name in recipe.compositions:
            yield from (Row(name, r, p, space.artifact(name, r, p)) for r, p in forms)
    if "bundle" in recipe.export.ship:
        for name in (*recipe.compositions, ALONE):
            yield from (Row(name, r, p, space.bundle(r, p), bundle=True) for r, p in forms)


def export_all(space: Workspace, *, preflight: bool = True) -> None:
    """Export all compositions in every form that the recipe asks for."""
    recipe, settings = space.recipe, space.recipe.export
    adapters = {
        name: need(space.composed(name, best_method(space, name)), "composed adapter", "calibrate")
        for name in recipe.compositions
    }
    shared = {t: space.adapter(t) for tasks in recipe.compositions.values() for t in tasks}
    for row in rows_of(space):
        how = Quantization(
            row.precision,
            settings.int8_layers if row.precision == "int4" else (),
            settings.embedding_bits if row.precision == "int4" else None,
            settings.cache_bits if row.runtime == "executorch" else None,
        )
        form = f"{row.runtime} {row.precision}"
        if not row.bundle:
            export_to(
                row.artifact,
                f"{row.composition}: {form}",
                space.base,
                adapters[row.composition],
                row.runtime,
                how,
                settings.context,
                preflight=preflight,
            )
        elif row.composition == ALONE:
            bundle_to(
                row.artifact,
                f"bundle of {len(adapters)}: {form}",
                space.base,
                adapters,
                shared if row.runtime == "executorch" else {},
                row.runtime,
                how,
                settings.context,
                preflight=preflight,
            )


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
        from export.artifact import fill

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
        from export import bundling, onnx_bundle

        if runtime == "onnx":
            onnx_bundle.fill_bundle(partial, extra, base, compositions, how, context)
        else:
            bundling.fill_bundle(partial, extra, base, compositions, shared, how, context)

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
    from export.preflight import preflight

    preflight(*given, **more)
