"""The integers that an artifact holds, where calibration text was needed to find them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from caliport.core.errors import InputError
from caliport.export.artifact import Artifact
from caliport.export.calibrating import DIGITS
from caliport.validation.runners import engine as engines


class ArtifactIntegers:
    """Integers and scales of an artifact's linear layers, read from its program.

    Equal for artifacts with equal integers, whatever their runtime.

    Args:
        artifact: One whose ``calibrated`` is not empty.
        base: A Hugging Face directory or hub name, for the shapes.
    """

    def __init__(self, artifact: Artifact, base: str | Path) -> None:
        self._artifact, self._base = artifact, base

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArtifactIntegers) and self._recorded == other._recorded

    def __hash__(self) -> int:
        return hash(self._recorded)

    def __contains__(self, module: str) -> bool:
        return module in self._artifact.calibrated

    def __iter__(self) -> Iterator[str]:
        return iter(self._artifact.calibrated)

    def read(self) -> ArtifactIntegers:
        """Read all from the program now.

        Raises:
            InputError: The program cannot be read, or the base has no such layers.
        """
        _ = self._parts
        return self

    def parts(self, module: str) -> tuple[Tensor, Tensor]:
        """Packed integers, uint8 [out, in / 2], and scales, bfloat16 [out, in / 32].

        Raises:
            InputError: The program cannot be read, or does not hold them.
        """
        if module not in self._parts:
            raise InputError(
                f"{self._artifact.directory}: its program does not hold the integers of {module} "
                "that its manifest records; export again"
            )
        return self._parts[module]

    def changed(self) -> list[str]:
        """Layers whose integers or scales are not those that the manifest records."""
        return [
            module
            for module, digits in self._artifact.calibrated.items()
            if [_digest(part) for part in self.parts(module)] != list(digits)
        ]

    @property
    def _recorded(self) -> tuple[tuple[str, ...], ...]:
        return tuple((name, *digits) for name, digits in sorted(self._artifact.calibrated.items()))

    @cached_property
    def _parts(self) -> dict[str, tuple[Tensor, Tensor]]:
        from caliport.core.checkpoints import load_config
        from caliport.export.decoder.skeleton import empty

        whole = empty(load_config(self._base)[0], buffers=False)
        shapes = {}
        for module in self._artifact.calibrated:
            weight = dict(whole.named_parameters(remove_duplicate=False)).get(f"{module}.weight")
            if weight is None or weight.dim() != 2:
                raise InputError(
                    f"{self._artifact.directory}: its manifest records integers of {module}, which "
                    f"{self._base} does not have; validate with the base that it was made from"
                )
            shapes[module] = (weight.shape[0], weight.shape[1])
        engine = engines.get(self._artifact.runtime)
        return dict(engine.integers(self._artifact, shapes))


def _digest(part: Tensor) -> str:
    content = part.contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()[:DIGITS]
