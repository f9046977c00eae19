"""An exported artifact: its directory together with the facts in its manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caliport.core.directories import MANIFEST, check_files, read_manifest
from caliport.core.errors import InputError
from caliport.core.prompts import PROMPT, check_prompt
from caliport.core.untrusted import check_regular
from caliport.export import runtime as runtimes
from caliport.export.manifest import check_artifact_manifest
from caliport.export.quantization.choices import Quantization

BASE_ALONE = "base alone"
"""What reports call a bundle's base without a composition."""
UNKNOWN = "unknown"
"""The precision of an artifact without a caliport manifest."""


@dataclass(frozen=True)
class Artifact:
    """A directory with a program that a runtime can run, and the contents of its manifest.

    Attributes:
        directory: Directory of its files.
        runtime: Name of its runtime (``caliport.export.runtime.names``).
        precision: ``fp32``, ``int8`` or ``int4``; ``UNKNOWN`` if another tool made it.
        manifest: Contents of ``manifest.json``; empty if another tool made it.
    """

    directory: Path
    runtime: str
    precision: str
    manifest: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def read(cls, directory: str | Path) -> Artifact:
        """Read an artifact's manifest; its other files are not opened.

        A directory with a program but no manifest was made by another tool.

        Raises:
            InputError: No program, programs of two runtimes, something beside it that is not a
                regular file of the directory, or see ``check_artifact_manifest``.
        """
        directory = Path(directory)
        if not (directory / MANIFEST).is_file() and (found := runtimes.recognized(directory)):
            if len(found) > 1:
                raise InputError(
                    f"{directory}: has programs of {' and '.join(found)}, expected one runtime's"
                )
            _check_entries(directory)
            return cls(directory, found[0], UNKNOWN)
        manifest = read_manifest(directory)
        check_artifact_manifest(manifest, directory)
        _check_entries(directory)
        return cls(directory, manifest["runtime"], manifest["precision"], manifest)

    @property
    def is_ours(self) -> bool:
        """Whether caliport made it; only then is there a manifest."""
        return bool(self.manifest)

    @property
    def quantization(self) -> Quantization:
        """How its weights are quantized; only valid if ``is_ours``."""
        return Quantization.of(self.manifest)

    @property
    def calibrated(self) -> Mapping[str, Sequence[str]]:
        """By linear layer, the hashes of integers and scales that were found on calibration text.

        As ``caliport.export.calibrated.requests.calibrated`` records them; empty where a base
        alone gives the integers again.
        """
        found: Mapping[str, Sequence[str]] = self.manifest.get("calibration", {}).get("weights", {})
        return found

    @property
    def context(self) -> int | None:
        """Length of its key-value cache in tokens; None if no manifest records it."""
        context: int | None = self.manifest.get("context")
        return context

    @property
    def is_bundle(self) -> bool:
        """Whether it keeps compositions beside a frozen base instead of folding one in."""
        return "bundle" in self.manifest

    @property
    def compositions(self) -> Mapping[str, Mapping[str, Any]]:
        """A bundle's compositions by name, with their manifest entries; empty for a fold."""
        found: Mapping[str, Mapping[str, Any]] = self.manifest.get("bundle", {}).get(
            "compositions", {}
        )
        return found

    @property
    def inputs(self) -> Mapping[str, str]:
        """Content hashes of its inputs, by label."""
        found: Mapping[str, str] = self.manifest.get("inputs", {})
        return found

    @property
    def form(self) -> str:
        """Runtime and precision, such as ``onnx-int4``, with ``-bundle`` for a bundle."""
        return form_of(self.runtime, self.precision, self.is_bundle)

    def composition(self, name: str) -> Mapping[str, Any]:
        """The manifest entry of one composition of a bundle.

        Raises:
            InputError: There is no composition of that name.
        """
        if name not in self.compositions:
            listed = ", ".join(self.compositions) or "none"
            raise InputError(
                f"{self.directory}: has no composition {name!r}, expected one of {listed}"
            )
        return self.compositions[name]

    def prompt(self, composition: str | None = None) -> str | None:
        """The prompt template that its adapter, or a bundle's composition, was trained with.

        Returns:
            Text with ``{input}``; None if no manifest records it, or for a base alone.

        Raises:
            InputError: No composition of that name, or what is recorded is no template.
        """
        where = f"{self.directory / MANIFEST}: prompt"
        if composition is None:
            facts: object = self.manifest.get("adapter")
        else:
            facts = self.composition(composition).get("lora")
            where += f" of {composition}"
        found = facts.get(PROMPT) if isinstance(facts, dict) else None
        return None if found is None else check_prompt(found, where)

    def check(self) -> None:
        """Check its files against its manifest; without a manifest nothing is checked.

        Raises:
            InputError: The first file that is missing, changed or not recorded.
        """
        if self.is_ours:
            check_files(self.directory)


def _check_entries(directory: Path) -> None:
    """Check all that a runtime may open by its name alone: no devices, pipes or links elsewhere."""
    for entry in sorted(directory.iterdir()):
        if not entry.is_dir() and not entry.name.startswith("."):
            check_regular(entry, root=directory)


def form_of(runtime: str, precision: str, bundle: bool) -> str:
    """Runtime and precision, such as ``onnx-int4``, with ``-bundle`` for a bundle."""
    return f"{runtime}-{precision}{'-bundle' if bundle else ''}"
