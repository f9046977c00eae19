"""LC++: one small low-rank update per component, added to the merge."""

from __future__ import annotations

import math
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


class LCPlusPlus(Correction):
    """LC++: ΔW = B'·A' + P2·P1 with P1 ∈ R^{s×in}, P2 ∈ R^{out×s}.

    Eq. 7 of arXiv 2507.16083, where s = 4. Initialised like a LoRA: P1 uniform as in PEFT, P2 zero.
    """

    def __init__(
        self, compositions: Mapping[str, Composition], per_layer: bool = False, rank: int = 4
    ) -> None:
        super().__init__()
        self._merged = freeze_updates({name: c.merged for name, c in compositions.items()})
        self._names = parameter_names([c.merged for c in compositions.values()], per_layer)
        self.p1 = nn.ParameterDict()
        self.p2 = nn.ParameterDict()
        for name, (out, into) in parameter_shapes(self._names, compositions).items():
            self.p1[name] = nn.Parameter(torch.empty(rank, into))
            nn.init.kaiming_uniform_(self.p1[name], a=math.sqrt(5))
            self.p2[name] = nn.Parameter(torch.zeros(out, rank))

    def factors(self, composition: str, module: str) -> Pair:
        """[A'; P1] and [B' P2], of rank R + s."""
        name = self._names[module]
        a, b = self._merged[composition].pair(module)
        return torch.cat([a, self.p1[name]]), torch.cat([b, self.p2[name]], dim=1)


CORRECTION = CorrectionType(
    name="lc++",
    label="LC++ (Eq. 7)",
    source="Learnable Calibration, arXiv 2507.16083, Eq. 7",
    limits="",
    alone=True,
    build=LCPlusPlus,
)
