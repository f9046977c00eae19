"""CAT: one learned weight for each adapter and module."""

from __future__ import annotations

from collections.abc import Mapping

from caliport.calibrate.corrections.common import Composition, CorrectionType
from caliport.calibrate.corrections.scales import ColumnScales


class CAT(ColumnScales):
    """Concatenation with learned weights: ΔW = Σᵢ wᵢ·Bᵢ·Aᵢ, one wᵢ for each adapter and module.

    LoRA Soups (arXiv 2410.13025). The wᵢ begin at the weights of the composition (1/N each). They
    are not shared by layers: a module has only N of them.
    """

    def __init__(self, compositions: Mapping[str, Composition], per_layer: bool = False) -> None:
        super().__init__(compositions, per_layer=True)

    @staticmethod
    def _count(into: int) -> int:
        return 1


CORRECTION = CorrectionType(
    name="cat",
    label="CAT",
    source="LoRA Soups, arXiv 2410.13025",
    limits="CAT needs the LoRAs that it weights",
    alone=False,
    build=CAT,
    merges=False,
    per_layer=False,
)
