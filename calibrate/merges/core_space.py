"""Core Space: a basis that all adapters share, in which each ΔWᵢ is a small matrix, lossless.

Core Space merging (arXiv 2509.17786): with orthonormal bases U of the columns of [B₁ B₂ …] and V of
the rows of [A₁; A₂; …], every ΔWᵢ is U·Mᵢ·Vᵀ with Mᵢ = Uᵀ·Bᵢ·Aᵢ·V of at most Σ rᵢ rows and columns.
A merge of the Mᵢ costs as much as the adapters are large, and no dense ΔW is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from caliport.calibrate.low_rank import LowRankUpdate

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Core:
    """One module of several adapters in Core Space, in float64.

    Attributes:
        columns: U [out, k], k ≤ Σ rᵢ.
        rows: Vᵀ [l, in], l ≤ Σ rᵢ.
        parts: Mᵢ [k, l] of each adapter.
    """

    columns: Tensor
    rows: Tensor
    parts: list[Tensor]

    @classmethod
    def of(cls, updates: Sequence[LowRankUpdate], name: str) -> Core:
        """The module ``name`` of updates that all have it."""
        pairs = [(u.b[name].double(), u.a[name].double()) for u in updates]
        columns = _basis(torch.cat([b for b, _ in pairs], dim=1))
        rows = _basis(torch.cat([a for _, a in pairs]).T).T
        return cls(columns, rows, [(columns.T @ b) @ (a @ rows.T) for b, a in pairs])

    def factors(self, merged: Tensor) -> tuple[Tensor, Tensor]:
        """A [min(k, l), in] and B [out, min(k, l)], float32, of ΔW = U·M·Vᵀ for a merged M."""
        u, s, vt = torch.linalg.svd(merged, full_matrices=False)
        root = s.sqrt()
        a, b = (root[:, None] * vt) @ self.rows, self.columns @ (u * root)
        return a.float().contiguous(), b.float().contiguous()


def nonzero(values: Tensor, largest: int) -> Tensor:
    """Which singular values of a matrix with ``largest`` rows or columns are more than rounding."""
    return values > largest * _EPS * values[:1]


def _basis(matrix: Tensor) -> Tensor:
    """An orthonormal basis [n, k] of the columns of [n, R]: their left singular vectors."""
    q, r = torch.linalg.qr(matrix)
    u, s, _ = torch.linalg.svd(r, full_matrices=False)
    return q @ u[:, nonzero(s, max(matrix.shape))]
