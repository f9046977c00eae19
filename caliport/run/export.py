"""The artifacts of a run, and artifacts from flags."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from caliport.export.quantization.choices import Quantization
from caliport.run.resolve import best_method
from caliport.run.workspace import Workspace, need
from caliport.stages.export import bundle_to, export_to
from caliport.validation.artifact import form_of

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
