"""The paths in a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from caliport.core.errors import InputError
from caliport.recipe.schema import Recipe


@dataclass(frozen=True)
class Workspace:
    """A recipe and its run directory."""

    recipe: Recipe
    root: Path

    @property
    def data(self) -> Path:
        """Directory of every task's examples as JSON Lines."""
        return self.root / "data"

    @property
    def base(self) -> Path | str:
        """The base model: the one trained by the recipe, or its ``base.path``."""
        return self.root / "base" if self.recipe.base.path is None else self.recipe.base.path

    def adapter(self, task: str) -> Path:
        """A single-task adapter: the path in the recipe, or the one made by it.

        Raises:
            InputError: With ``calibration.dora``, an adapter that cannot be read.
        """
        path = self.recipe.adapters[task]
        if path is None:
            return self.root / "adapters" / task
        return self.root / "low-rank" / task if self.is_approximated(task) else path

    def is_approximated(self, task: str) -> bool:
        """Whether the recipe asks for a low-rank update in place of a task's DoRA adapter."""
        path = self.recipe.adapters[task]
        if path is None or self.recipe.calibration.dora is None:
            return False
        from caliport.calibrate.dora import has_dora

        return has_dora(path)

    def composed(self, composition: str, method: str) -> Path:
        """A composed adapter."""
        return self.root / "composed" / composition / method

    def shared(self, method: str) -> Path:
        """The result of a method that trains once for all compositions."""
        return self.root / "shared" / method

    def artifact(self, composition: str, runtime: str, precision: str) -> Path:
        """An exported artifact."""
        return self.root / "artifacts" / composition / f"{runtime}-{precision}"

    def bundle(self, runtime: str, precision: str) -> Path:
        """An exported bundle of all compositions."""
        return self.root / "bundles" / f"{runtime}-{precision}"

    @property
    def reports(self) -> Path:
        """Reports of the run."""
        return self.root / "reports"

    def kept(self, kind: str, *names: str) -> Path:
        """Path of one part of a report, kept until the report is assembled."""
        return self.root / ".parts" / kind / Path(*names)


def need(path: Path, what: str, command: str) -> Path:
    """Return ``path`` if it exists.

    Raises:
        InputError: It does not exist; the message names the command that makes it.
    """
    if not path.exists():
        raise InputError(f"{path}: no {what} yet; run `caliport {command}` on the recipe first")
    return path
