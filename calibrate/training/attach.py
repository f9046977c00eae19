"""Run a frozen base with low-rank terms attached, different ones for different rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Terms = Callable[[str], Iterable[tuple[Tensor | None, Tensor, Tensor]]]
"""From a module's name to the terms of the current batch: rows (int64 [n]; None: all), A and B."""

Rounding = Callable[[str, Tensor], Tensor]
"""From a module's name and its float weight [out, in] to the values that will ship for it."""


@contextmanager
def attached(model: nn.Module, modules: Sequence[str], terms: Terms) -> Iterator[None]:
    """Make the named linear layers compute W0·x + Σ B·(A·x) inside the ``with`` block.

    The base's weights stay bit-identical. A term is computed for its own rows only.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for rows, a, b in terms(name):
                output = _add(output, rows, _low_rank(_of(inputs[0], rows), a, b))
            return output

        return add

    handles: list[Any] = []
    try:
        for name in modules:
            handles.append(model.get_submodule(name).register_forward_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def attached_rounded(
    model: nn.Module,
    modules: Sequence[str],
    terms: Terms,
    rounding: Rounding,
    keep: bool = False,
) -> Iterator[None]:
    """Make the named linear layers compute with Q(W0 + ΔW), the weights that ship.

    ΔW gets the straight-through gradient (Bengio et al., arXiv 1308.3432), that of W0 + ΔW without
    Q. It is taken through the low-rank path x ↦ B·(A·x), which has the same gradient in A and B, so
    the dense ΔW needs none.

    Args:
        model: The base; its weights stay bit-identical.
        modules: Linear layers whose weight is rounded together with its update.
        terms: As for ``attached``, with exactly one term per row.
        rounding: Q.
        keep: Keep each rounded weight until its update changes, for several passes a step; takes
            the memory of these weights.
    """
    kept: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]] = {}

    def weight_of(key: tuple[str, int], module: nn.Linear, a: Tensor, b: Tensor) -> Tensor:
        known = kept.get(key)
        if known is not None and torch.equal(known[0], a) and torch.equal(known[1], b):
            return known[2]
        delta = b.to(module.weight.device) @ a.to(module.weight.device)
        weight = rounding(key[0], module.weight + delta)
        if keep:
            kept[key] = a.detach().clone(), b.detach().clone(), weight
        return weight

    def forward(name: str, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        def run(inputs: Tensor) -> Tensor:
            output = None
            for index, (rows, a, b) in enumerate(terms(name)):
                with torch.no_grad():
                    weight = weight_of((name, index), module, a, b)
                x = _of(inputs, rows)
                low_rank = _low_rank(x.detach(), a, b)
                part = functional.linear(x, weight, module.bias) + (low_rank - low_rank.detach())
                if rows is None:
                    return part
                if output is None:
                    output = part.new_zeros(*inputs.shape[:-1], module.out_features)
                output = _add(output, rows, part)
            assert output is not None, "every row has a term"
            return output

        return run

    linears = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in linears.items():
            assert isinstance(module, nn.Linear)
            module.forward = forward(name, module)  # type: ignore[method-assign,assignment]
        yield
    finally:
        for module in linears.values():
            module.__dict__.pop("forward", None)


class Rows:
    """The label (a composition) of each row of the current batch."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = labels
        self.groups: list[tuple[str, Tensor | None]] = []

    def __call__(self, indices: Sequence[int], step: int) -> None:
        """Set the rows of the next batch: the ``on_batch`` of ``fit``."""
        labels = [self._labels[index] for index in indices]
        kinds = sorted(set(labels))
        self.groups = [
            (kind, None if len(kinds) == 1 else torch.tensor(_positions(labels, kind)))
            for kind in kinds
        ]


def _positions(labels: Sequence[str], kind: str) -> list[int]:
    return [index for index, label in enumerate(labels) if label == kind]


def _low_rank(inputs: Tensor, a: Tensor, b: Tensor) -> Tensor:
    a, b = a.to(inputs.device), b.to(inputs.device)
    return functional.linear(functional.linear(inputs, a), b)


def _of(inputs: Tensor, rows: Tensor | None) -> Tensor:
    return inputs if rows is None else inputs.index_select(0, rows.to(inputs.device))


def _add(output: Tensor, rows: Tensor | None, part: Tensor) -> Tensor:
    if rows is None:
        return output + part
    return output.index_add(0, rows.to(output.device), part.to(output.dtype))
