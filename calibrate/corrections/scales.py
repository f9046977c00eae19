"""Column scales: one factor per input of each adapter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from caliport.calibrate.corrections.common import (
    Composition,
    Correction,
    CorrectionType,
    Pair,
    freeze_updates,
    parameter_names,
)


class ColumnScales(Correction):
    """Column scales: ΔW = Σᵢ Bᵢ·Aᵢ·diag(mᵢ) with mᵢ ∈ R^in, initially the weights (1/N each).

    ZipLoRA (arXiv 2311.13600) and DAM (arXiv 2410.08371). A scale belongs to an adapter and a
    component, or with ``per_layer`` to an adapter and a module as in the papers. Compositions that
    share an adapter share its scales.
    """

    def __init__(self, compositions: Mapping[str, Composition], per_layer: bool = False) -> None:
        super().__init__()
        updates = {t: u for c in compositions.values() for t, u in c.updates.items()}
        self._tasks = {name: tuple(c.updates) for name, c in compositions.items()}
        self._updates = freeze_updates(updates)
        self._names = parameter_names(list(updates.values()), per_layer)
        share = {t: w for c in compositions.values() for t, w in c.shares.items()}
        self.m = nn.ParameterDict()
        for task, update in updates.items():
            for module in update.modules:
                key = f"{task} {self._names[module]}"
                if key not in self.m:
                    count = self._count(update.shape(module)[1])
                    self.m[key] = nn.Parameter(torch.full((count,), share[task]))

    @staticmethod
    def _count(into: int) -> int:
        """Scales of one adapter and module."""
        return into

    def factors(self, composition: str, module: str) -> Pair:
        """[A₁·diag(m₁); A₂·diag(m₂); …] and [B₁ B₂ …], of rank Σ rᵢ."""
        rows, columns = [], []
        for task in self._tasks[composition]:
            frozen = self._updates[task]
            if module in frozen:
                a, b = frozen.pair(module)
                rows.append(a * self.m[f"{task} {self._names[module]}"])
                columns.append(b)
        return torch.cat(rows), torch.cat(columns, dim=1)


CORRECTION = CorrectionType(
    name="scales",
    label="column scales",
    source="ZipLoRA, arXiv 2311.13600; DAM, arXiv 2410.08371",
    limits="column scales need the LoRAs that they scale",
    alone=False,
    build=ColumnScales,
    merges=False,
)
