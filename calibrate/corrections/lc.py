"""XXX."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from caliport.calibrate.corrections.common import Composition, Pair, _held, _owners, _shapes


class LC(nn.Module):
    """ΔW = B'·A' + p·1ᵀ with p ∈ R^out, p = 0 at the start (Eq. 6).

    The paper prints a form that also reads as a product; with p = 0 that would erase the merge,
    so the sum is meant. p·1ᵀ is the rank-1 update A = 1ᵀ, B = p.
    """

    def __init__(self, compositions: Mapping[str, Composition], per_layer: bool = False) -> None:
        super().__init__()
        self._merged = _held({name: c.merged for name, c in compositions.items()})
        self._owner = _owners([c.merged for c in compositions.values()], per_layer)
        self.p = nn.ParameterDict()
        self._ones = nn.ParameterDict()
        for owner, (out, into) in _shapes(self._owner, compositions).items():
            self.p[owner] = nn.Parameter(torch.zeros(out))
            self._ones[owner] = nn.Parameter(torch.ones(1, into), requires_grad=False)

    def factors(self, composition: str, module: str) -> Pair:
        """[A'; 1ᵀ] and [B' p], of rank R + 1."""
        owner = self._owner[module]
        a, b = self._merged[composition].pair(module)
        return torch.cat([a, self._ones[owner]]), torch.cat([b, self.p[owner][:, None]], dim=1)
