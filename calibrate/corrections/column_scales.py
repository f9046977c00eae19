"""XXX."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from caliport.calibrate.corrections.common import Composition, Pair, _held, _owners


class ColumnScales(nn.Module):
    """ΔW = Σᵢ Bᵢ·Aᵢ·diag(mᵢ) with mᵢ ∈ R^in, mᵢ = 1/N at the start (ZipLoRA, DAM).

    A scale belongs to an adapter and to a component, or with ``per_layer`` to one module as in
    the papers. Compositions that share an adapter share its scales.
    """

    def __init__(self, compositions: Mapping[str, Composition], per_layer: bool = False) -> None:
        super().__init__()
        updates = {t: u for c in compositions.values() for t, u in c.updates.items()}
        self._tasks = {name: tuple(c.updates) for name, c in compositions.items()}
        self._updates = _held(updates)
        self._owner = _owners(list(updates.values()), per_layer)
        share = {t: 1 / len(c.updates) for c in compositions.values() for t in c.updates}
        self.m = nn.ParameterDict()
        for task, update in updates.items():
            for module in update.modules:
                key = f"{task} {self._owner[module]}"
                if key not in self.m:
                    into = update.shape(module)[1]
                    self.m[key] = nn.Parameter(torch.full((into,), share[task]))

    def factors(self, composition: str, module: str) -> Pair:
        """[A₁·diag(m₁); A₂·diag(m₂); …] and [B₁ B₂ …], of rank Σ rᵢ."""
        rows, columns = [], []
        for task in self._tasks[composition]:
            held = self._updates[task]
            if module in held:
                a, b = held.pair(module)
                rows.append(a * self.m[f"{task} {self._owner[module]}"])
                columns.append(b)
        return torch.cat(rows), torch.cat(columns, dim=1)
