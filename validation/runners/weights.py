"""Weight matrices of an artifact, as the integers and scales that its files hold."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from caliport.core.errors import InputError
from caliport.core.model_files.tensor_files import read_header
from caliport.export.artifact import Artifact
from caliport.export.calibrated.requests import DIGITS
from caliport.export.quantization.choices import NORMS
from caliport.export.quantization.tensors import unpacked
from caliport.validation.runners import engine as engines

if TYPE_CHECKING:
    from caliport.export.decoder.shipped import ShippedDecoder
    from caliport.export.decoder.stored import Weights


@dataclass(frozen=True)
class StoredWeight:
    """One weight matrix.

    Attributes:
        data: int8 integers, or float32 values, [out, in].
        scale: float32 [out, groups]; None for float32 values.
    """

    data: Tensor
    scale: Tensor | None

    def values(self) -> Tensor:
        """float32 [out, in]."""
        if self.scale is None:
            return self.data.float()
        width, groups = self.data.shape[1], self.scale.shape[1]
        block = -(-width // groups)
        return self.data.float() * self.scale.repeat_interleave(block, 1)[:, :width]

    def equals(self, other: StoredWeight) -> bool:
        """Whether both are the same numbers, bit for bit."""
        if (self.scale is None) != (other.scale is None) or self.data.dtype != other.data.dtype:
            return False
        if self.scale is not None and other.scale is not None:
            return torch.equal(self.data, other.data) and torch.equal(self.scale, other.scale)
        return torch.equal(self.data, other.data)


def requested_weight(weights: Weights, name: str) -> StoredWeight:
    """The weight that should ship for a module, as ``shipped_decoder`` made it."""
    if f"{name}.weight" in weights:
        return StoredWeight(weights[f"{name}.weight"].tensor(), None)
    data = weights[f"{name}.weight.data"].tensor()
    data = unpacked(data) if data.dtype == torch.uint8 else data
    return StoredWeight(data, weights[f"{name}.weight.scale"].tensor().float())


def matrices_of(decoder: ShippedDecoder) -> list[str]:
    """Modules whose weight is a matrix."""
    return [
        name
        for name, module in decoder.whole.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if key == "weight" and parameter.dim() == 2
    ]


def energy_beyond(difference: Tensor, rank: int) -> float:
    """The energy of a matrix beyond what two updates of a rank, and one row, can make of it."""
    if not difference.isfinite().all():
        return math.inf
    return float(torch.linalg.svdvals(difference)[2 * rank + 1 :].square().sum())


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

    @cached_property
    def replaced(self) -> Mapping[str, Tensor]:
        """Tuned gains of normalizations, float32 [width], by parameter name.

        Raises:
            InputError: Their file cannot be read, or does not have finite gains of the base.
        """
        if not self._artifact.quantization.tune_norms:
            return {}
        from caliport.core.checkpoints import load_config
        from caliport.export.calibrated.norms import gains_of
        from caliport.export.decoder.skeleton import empty

        place = self._artifact.directory / NORMS
        wanted = {
            name: list(gain.shape)
            for name, gain in gains_of(empty(load_config(self._base)[0], buffers=False)).items()
        }
        if {name: list(t.shape) for name, t in read_header(place).items()} != wanted:
            raise InputError(f"{place}: expected the gains of the base's normalizations")
        from safetensors.torch import load_file

        found = load_file(place)
        for name, gain in found.items():
            if gain.dtype != torch.float32 or not gain.isfinite().all():
                raise InputError(f"{place}: {name}: expected finite float32 gains")
        return found

    def read(self) -> ArtifactIntegers:
        """Read all from the program now, for threads that must not wait for one another.

        Raises:
            InputError: The program cannot be read, or the base has no such layers.
        """
        _ = self._parts, self.replaced
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
        found = [(name, *digits) for name, digits in sorted(self._artifact.calibrated.items())]
        return (*found, (str(self._artifact.manifest["files"].get(NORMS)),))

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
