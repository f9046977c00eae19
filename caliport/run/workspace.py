"""The run directory and the rule that a stage whose inputs have not changed is skipped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from caliport.core.errors import InputError
from caliport.recipe.schema import Recipe


@dataclass(frozen=True)
class Workspace:
    """A recipe and the directory that its run fills."""

    recipe: Recipe
    root: Path

    @property
    def data(self) -> Path:
        """Examples of every task as JSON Lines."""
        return self.root / "data"

    @property
    def base(self) -> Path | str:
        """The base model: the recipe's own, or what it names."""
        return self.root / "base" if self.recipe.base.path is None else self.recipe.base.path

    def adapter(self, task: str) -> Path:
        """A single-task adapter: the one that the recipe names, or the one that it trains."""
        return self.recipe.adapters[task] or self.root / "adapters" / task

    def composed(self, composition: str, method: str) -> Path:
        """A composed adapter."""
        return self.root / "composed" / composition / method

    def shared(self, method: str) -> Path:
        """What a method trains once for all compositions."""
        return self.root / "shared" / method

    def artifact(self, composition: str, runtime: str, precision: str) -> Path:
        """An exported artifact."""
        return self.root / "artifacts" / composition / f"{runtime}-{precision}"

    def bundle(self, runtime: str, precision: str) -> Path:
        """One exported base with all compositions beside it."""
        return self.root / "bundles" / f"{runtime}-{precision}"

    @property
    def reports(self) -> Path:
        """Reports of the run."""
        return self.root / "reports"

    def kept(self, kind: str, *names: str) -> Path:
        """Where one part of a report waits until the report is put together."""
        return self.root / ".parts" / kind / Path(*names)


def need(path: Path, what: str, command: str) -> Path:
    """``path`` if it is there; otherwise say which command makes it.

    Raises:
        InputError: It is not there.
    """
    if not path.exists():
        raise InputError(f"{path}: no {what} yet; run `caliport {command}` on the recipe first")
    return path
