"""Are integers that were found on calibration text those of the requested weights, W0 + ΔW?

Without the text they cannot be found again, so three things are asked instead: are they the ones
that the manifest records, are they no farther from W0 + ΔW than rounding with error feedback takes
them, and is ΔW in them just once?
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from caliport.export.decoder.fold import Folded
from caliport.export.quantization.choices import GROUP_SIZE
from caliport.validation.runners.weights import ArtifactIntegers, requested_weight

if TYPE_CHECKING:
    from collections.abc import Callable

    from caliport.export.decoder.shipped import ShippedDecoder

_ROUNDING = 12.0
"""Most energy of a matrix's error, in multiples of scale² / 12 a value, that of plain rounding."""
_HELD, _SIGMAS = 0.05, 4.0


@dataclass(frozen=True)
class Finding:
    """What is wrong with calibrated integers, or that nothing is.

    Attributes:
        odd: Layers that are not as they should be.
        stage: The stage that it is attributed to.
        reason: In words.
    """

    odd: tuple[str, ...]
    stage: str
    reason: str


def inspect(
    integers: ArtifactIntegers, decoder: ShippedDecoder, read: Callable[[str], Tensor]
) -> Finding:
    """Inspect the integers of a fold.

    Args:
        integers: The artifact's.
        decoder: What should have shipped, with these integers.
        read: Gives the base's parameters by name.
    """
    if changed := integers.changed():
        return Finding(tuple(changed), "lowering", "not the integers that were found on its text")
    far: list[str] = []
    held = energy = noise = 0.0
    for name in integers:
        full = f"{name}.weight"
        base = read(full)
        folded = Folded.of(decoder.adapter, decoder.whole.get_submodule(name), full, base)
        wanted, stored = folded.rows(0, len(base)), requested_weight(decoder.weights, name)
        error = float((stored.values() - wanted).square().sum())
        assert stored.scale is not None
        if error > _ROUNDING * float(stored.scale.square().sum()) * GROUP_SIZE / 12:
            far.append(name)
        delta = wanted - base.float()
        held += float(((stored.values() - base.float()) * delta).sum())
        energy += (size := float(delta.square().sum()))
        noise += size * error / delta.numel()
    if energy:
        share, sigma = held / energy, math.sqrt(noise) / energy
        if abs(share - 1) > max(_HELD, _SIGMAS * sigma):
            return Finding(tuple(integers), "adapter", f"together they hold {share:.2f} of ΔW")
    if far:
        return Finding(tuple(far), "quantization", "farther from W0 + ΔW than rounding takes them")
    return Finding((), "adapter", "all are W0 + ΔW, rounded on calibration text as recorded")
