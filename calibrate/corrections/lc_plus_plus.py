"""XXX."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from caliport.calibrate.corrections.common import Composition, Pair, _held, _owners, _shapes


class LCPlusPlus(nn.Module):
    """ΔW = B'·A' + P2·P1 with P1 ∈ R^{s×in}, P2 ∈ R^{out×s} (Eq. 7; s = 4 in the paper).

    Initialised like a LoRA: P1 uniform as in PEFT, P2 zero.
    """

    def __init__(
        self, compositions: Mapping[str, Composition], per_layer: bool = False, rank: int = 4
    ) -> None:
        super().__init__()
        self._merged = _held({name: c.merged for name, c in compositions.items()})
        self._owner = _owners([c.merged for c in compositions.values()], per_layer)
        self.p1 = nn.ParameterDict()
        self.p2 = nn.ParameterDict()
        for owner, (out, into) in _shapes(self._owner, compositions).items():
            self.p1[owner] = nn.Parameter(torch.empty(rank, into))
            nn.init.kaiming_uniform_(self.p1[owner], a=math.sqrt(5))
            self.p2[owner] = nn.Parameter(torch.zeros(out, rank))

    def factors(self, composition: str, module: str) -> Pair:
        """[A'; P1] and [B' P2], of rank R + s."""
        owner = self._owner[module]
        a, b = self._merged[composition].pair(module)
        return torch.cat([a, self.p1[owner]]), torch.cat([b, self.p2[owner]], dim=1)
