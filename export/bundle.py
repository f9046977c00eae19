"""What a bundle is made of: shared single-task adapters, compositions that stand on them, and the
eager model that each composition should equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from calibrate.low_rank import LowRankUpdate
from caliport_core.errors import InputError
from export import artifact
from export.artifact import Quantization
from export.quantize import Form, quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAME = 1e-5


@dataclass(frozen=True)
class Composed:
    """A composition as the terms that a bundle computes: ΔW = w²·(Σ Bᵢ)(Σ Aᵢ) + B·A.

    The first term is the linear merge of shared adapters (Learnable Calibration, arXiv 2507.16083,
    Eq. 5, w = 1/N), which so need no copy for each composition; the second is its own.

    Attributes:
        adapters: Names of the shared adapters; none for a composition that is all its own.
        weight: w.
        own: The composition's own update, or None.
    """

    adapters: tuple[str, ...]
    weight: float
    own: LowRankUpdate | None


def split(update: LowRankUpdate, adapters: Mapping[str, LowRankUpdate]) -> Composed:
    """Find the linear merge of some adapters inside a composed update.

    LC and LC++ put their correction behind the merge: the first rows of A are w·Σ Aᵢ and the first
    columns of B are w·Σ Bᵢ. They are compared in every module to a relative 1e-5, so an update
    that is no such merge is kept whole.

    Args:
        update: The composed update.
        adapters: Those that may lie underneath.
    """
    whole = Composed((), 1.0, update)
    fits = {n: a for n, a in adapters.items() if _could_hold(update, a)}
    if not fits:
        return whole
    first = update.modules[0]
    rank = next(iter(fits.values())).rank(first)
    columns = torch.stack([a.a[first].flatten() for a in fits.values()], dim=1).double()
    merged = update.a[first][:rank].flatten().double()
    found = torch.linalg.lstsq(columns, merged.unsqueeze(1)).solution
    weights = dict(zip(fits, found.flatten().tolist(), strict=True))
    used = tuple(name for name, weight in weights.items() if abs(weight) > 1e-3)
    if not used:
        return whole
    weight = weights[used[0]]
    if math.isclose(weight, 1 / len(used), rel_tol=_SAME):  # exactly, so that programs are alike
        weight = 1 / len(used)
    a, b, own_a, own_b = {}, {}, {}, {}
    for name in update.modules:
        rank = fits[used[0]].rank(name)
        a[name], own_a[name] = update.a[name][:rank], update.a[name][rank:].clone()
        b[name], own_b[name] = update.b[name][:, :rank], update.b[name][:, rank:].clone()
        for part, parts in ((a[name], "a"), (b[name], "b")):
            total = weight * sum(getattr(fits[n], parts)[name] for n in used)
            if not _is_same(part, total):
                return whole
    rest = all(not tensor.numel() for tensor in own_a.values())
    own = None if rest else LowRankUpdate(own_a, own_b)
    return Composed(used, weight, own)


def _could_hold(update: LowRankUpdate, adapter: LowRankUpdate) -> bool:
    return update.modules == adapter.modules and all(
        update.rank(n) >= adapter.rank(n) and update.shape(n) == adapter.shape(n)
        for n in update.modules
    )


def _is_same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= _SAME * other.norm().clamp_min(1e-12))


def read_updates(base: str | Path, adapters: Mapping[str, Path]) -> dict[str, LowRankUpdate]:
    """Read adapters and check, before any weight is read, that they fit the base.

    Args:
        base: A Hugging Face directory or hub name.
        adapters: PEFT LoRA directories by any names.

    Raises:
        InputError: A base or adapter that cannot be read, an adapter of another base, or one of
            layers that have no terms beside them (``Conv1D``, GPT-2's).
    """
    from caliport_core.checkpoints import load_config
    from export.skeleton import empty

    whole = empty(load_config(base)[0])
    updates = {name: LowRankUpdate.from_peft(path) for name, path in adapters.items()}
    for name, update in updates.items():
        update.check_fits(whole, adapters[name])
        for module in update.modules:
            if not isinstance(layer := whole.get_submodule(module), nn.Linear):
                raise InputError(
                    f"{adapters[name]}: updates {module}, a {type(layer).__name__}; a bundle has "
                    "terms beside linear layers alone, so fold this adapter instead"
                )
    return updates


def shared_form(precision: str) -> Form | None:
    """How a bundle of a precision ships its shared adapters: 8 bits a row, or float32 (None)."""
    return None if precision == "fp32" else "int8"


def reference(
    base: str | Path,
    adapter: Path | None,
    how: Quantization,
    runtime: str,
    shared: Mapping[str, Path] | None = None,
    rounds: str | None = None,
) -> PreTrainedModel:
    """The eager model whose logits a bundle's composition should give: terms beside the base.

    The base alone is quantized, its activations rounded as the runtime rounds them; the terms are
    added to the outputs of its layers, not to their weights.

    Args:
        base: A Hugging Face directory or hub name.
        adapter: The composition's PEFT LoRA directory; None for the bundle's base.
        how: How the base is quantized.
        runtime: ``executorch`` or ``onnx``.
        shared: For ExecuTorch, the PEFT LoRA directories that the bundle shares.
        rounds: Of which runtime the rounding of the base's activations is; None for ``runtime``.

    Raises:
        InputError: A base or adapter that cannot be read, or do not fit.
    """
    model = artifact.reference(base, None, how, rounds or runtime)
    if adapter is None:
        return model
    updates = read_updates(base, {**(shared or {}), "": adapter})
    update = updates.pop("")
    form = shared_form(how.precision) if runtime == "executorch" else None
    return beside(model, split(update, updates), updates, form)


def beside(
    model: PreTrainedModel,
    composed: Composed,
    adapters: Mapping[str, LowRankUpdate],
    form: Form | None = None,
) -> PreTrainedModel:
    """Let an eager model's layers compute W0·x and a composition's terms, in place.

    Args:
        model: In any precision; its weights stay as they are.
        composed: The terms.
        adapters: The shared adapters by name.
        form: How those are rounded, their inputs likewise; the composition's own matrices are then
            float16, as in a ``.pte`` (``export.executorch_bundle``). None for float32.

    Returns:
        ``model``.
    """
    from export.executorch_bundle import halves

    shared = [adapters[name] for name in composed.adapters]
    own = composed.own
    for name in dict.fromkeys(n for u in (*shared, own) if u is not None for n in u.modules):
        parent, _, last = name.rpartition(".")
        layer = _Beside(
            model.get_submodule(name),
            [_linear(update.a[name], form) for update in shared],
            [_linear(update.b[name], form) for update in shared],
            composed.weight**2,
        )
        if own is not None and name in own.modules:
            pair = own.a[name], own.b[name]
            a, b = pair if form is None else halves(*pair)
            layer.own = nn.Sequential(_linear(a.float(), None), _linear(b.float(), None))
        setattr(model.get_submodule(parent), last, layer)
    return model


def _linear(matrix: Tensor, form: Form | None) -> nn.Linear:
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    weight = matrix if form is None else quantized(matrix, form)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class _Beside(nn.Module):
    """A layer of a base with low-rank terms beside it; all read its input as it is."""

    def __init__(
        self, layer: nn.Module, a: Sequence[nn.Linear], b: Sequence[nn.Linear], factor: float
    ) -> None:
        super().__init__()
        self.layer, self.a, self.b = layer, nn.ModuleList(a), nn.ModuleList(b)
        self.factor = factor
        self.own: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        if self.a:
            inner = torch.stack([a(x) for a in self.a]).sum(0)
            outer = torch.stack([b(inner) for b in self.b]).sum(0)
            output = output + outer * self.factor
        if self.own is not None:
            output = output + self.own(x)
        return output
