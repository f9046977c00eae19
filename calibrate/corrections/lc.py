"""LC: one vector per component, added to every column of the merge."""

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
    parameter_shapes,
)


class LC(Correction):
    """Learnable Calibration: ΔW = B'·A' + p·1ᵀ with p ∈ R^out, initially 0.

    Eq. 6 of arXiv 2507.16083. The paper prints a form that also reads as a product; with p = 0
    that would erase the merge, so the sum is meant. p·1ᵀ is the rank-1 update A = 1ᵀ, B = p.
    """

    def __init__(self, compositions: Mapping[str, Composition], per_layer: bool = False) -> None:
        super().__init__()
        self._merged = freeze_updates({name: c.merged for name, c in compositions.items()})
        self._names = parameter_names([c.merged for c in compositions.values()], per_layer)
        self.p = nn.ParameterDict()
        self._ones = nn.ParameterDict()
        for name, (out, into) in parameter_shapes(self._names, compositions).items():
            self.p[name] = nn.Parameter(torch.zeros(out))
            self._ones[name] = nn.Parameter(torch.ones(1, into), requires_grad=False)

    def factors(self, composition: str, module: str) -> Pair:
        """[A'; 1ᵀ] and [B' p], of rank R + 1."""
        name = self._names[module]
        a, b = self._merged[composition].pair(module)
        return torch.cat([a, self._ones[name]]), torch.cat([b, self.p[name][:, None]], dim=1)


CORRECTION = CorrectionType(
    name="lc",
    label="LC (Eq. 6)",
    source="Learnable Calibration, arXiv 2507.16083, Eq. 6",
    limits="",
    alone=True,
    build=LC,
)
