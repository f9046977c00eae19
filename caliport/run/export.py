"""Export a run's artifacts, and list them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from caliport.export.artifact import BASE_ALONE, form_of
from caliport.export.quantization.choices import Quantization
from caliport.export.quantization.quantizers.registry import needs_text
from caliport.export.quantization.text import CalibrationText
from caliport.export.request import Bundle, Request
from caliport.export.runtime import get
from caliport.run.integers import (
    bundle_place,
    bundle_quantizer,
    bundle_text,
    folded_quantizer,
    folded_text,
)
from caliport.run.resolve import best_method
from caliport.run.workspace import Workspace, need
from caliport.stages.export import export_to


@dataclass(frozen=True)
class Row:
    """An item that a recipe ships and validates: an artifact, or one part of a bundle.

    ``composition`` is ``BASE_ALONE`` for a bundle's base.
    """

    composition: str
    runtime: str
    precision: str
    artifact: Path
    bundle: bool = False

    @property
    def bundled(self) -> str | None:
        """The bundle's composition to run; None for a bundle's base or a fold."""
        return self.composition if self.bundle and self.composition != BASE_ALONE else None

    @property
    def form(self) -> str:
        """Runtime and precision, such as ``onnx-int4``, with ``-bundle`` for a bundle."""
        return form_of(self.runtime, self.precision, self.bundle)


def rows_of(space: Workspace) -> Iterator[Row]:
    """Everything that a recipe ships, folded artifacts first."""
    recipe = space.recipe
    forms = [(r, p) for r in recipe.export.runtimes for p in recipe.export.precisions]
    if "fold" in recipe.export.ship:
        for name in recipe.compositions:
            yield from (Row(name, r, p, space.artifact(name, r, p)) for r, p in forms)
    if "bundle" in recipe.export.ship:
        for name in (*recipe.compositions, BASE_ALONE):
            yield from (Row(name, r, p, space.bundle(r, p), bundle=True) for r, p in forms)


def export_all(space: Workspace, *, preflight: bool = True) -> None:
    """Export all compositions for every runtime and precision of the recipe."""
    recipe = space.recipe
    adapters = {
        name: need(space.composed(name, best_method(space, name)), "composed adapter", "calibrate")
        for name in recipe.compositions
    }
    for row in rows_of(space):
        how, length = _quantization(space, row), recipe.export.context
        goal = recipe.export.goal if row.precision == "int4" else None
        text = _text(space, row) if needs_text(how.quantizer) else None
        form = f"{row.runtime} {row.precision}"
        if not row.bundle:
            folded = adapters[row.composition]
            request = Request(space.base, row.runtime, how, length, folded, text=text, goal=goal)
            export_to(
                row.artifact,
                f"{row.composition}: {form}",
                request,
                refuse=preflight,
                integers=space.kept("integers", row.composition),
            )
        elif row.composition == BASE_ALONE:
            bundle = Bundle(adapters, _shared(space, row))
            request = Request(
                space.base, row.runtime, how, length, bundle=bundle, text=text, goal=goal
            )
            export_to(
                row.artifact,
                f"bundle of {len(adapters)}: {form}",
                request,
                refuse=preflight,
                integers=bundle_place(space),
            )


def _quantization(space: Workspace, row: Row) -> Quantization:
    """The recipe's quantization settings that apply to this row."""
    settings, is_int4 = space.recipe.export, row.precision == "int4"
    quantizer = None
    if is_int4 and row.bundle:
        quantizer = bundle_quantizer(space)
    elif is_int4:
        quantizer = folded_quantizer(space, best_method(space, row.composition))
    return Quantization(
        row.precision,
        settings.int8_layers if is_int4 else (),
        settings.embedding_bits if is_int4 else None,
        settings.cache_bits if get(row.runtime).has_int8_cache else None,
        quantizer,
        is_int4 and settings.tune_norms,
    )


def _text(space: Workspace, row: Row) -> CalibrationText:
    return bundle_text(space) if row.bundle else folded_text(space, row.composition)


def _shared(space: Workspace, row: Row) -> dict[str, Path]:
    """Single-task adapters of all compositions, if the runtime can share them."""
    if not get(row.runtime).shares_adapters:
        return {}
    tasks = (task for tasks in space.recipe.compositions.values() for task in tasks)
    return {task: space.adapter(task) for task in tasks}
