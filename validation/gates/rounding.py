"""How far rounding alone moves logits: the unit in which an artifact's distance is measured.

Two right implementations of one quantized model differ: their float32 sums run in another order,
so an activation on the edge between two steps is rounded to the other side, and one step of it
moves through all later layers. How much that is depends on the model. So it is measured: the
eager reference is evaluated again with the inputs of its linear layers changed by a few float32
roundings, and what that does to its logits is what a sound artifact may do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from caliport.validation.evaluation.evaluation import Answers, Evaluation, eager_answers
from caliport.validation.evaluation.measures import compare, distances
from caliport.validation.evaluation.probes import Echo, Probes, eager_echo
from caliport.validation.records.gate import Measures

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEEDS = (2, 8)
"""Fewest and most times that the reference is evaluated again."""
_ROUNDED = 2_500_000
"""So many inputs of linear layers show how far rounding moves a position: a flipped step is rare
and moves it far. A tiny model needs 2,000 positions for them, one of 135 million parameters 20."""
_BANK = 2**20
"""Values that a jitter's noise is cut from: to draw all of it would take as long as the layers."""
_JITTER = 4 * 2.0**-24


@dataclass(frozen=True)
class Said:
    """What one model says to prompts and probes."""

    answers: Answers
    echo: Echo


@dataclass(frozen=True)
class Expected:
    """What an artifact should say, and how far rounding alone moves that.

    Attributes:
        probes: What was asked beside the prompts.
        said: The eager reference's answers.
        noise: Distances from them when float32 rounds otherwise, by what was run.
        rounding: The same as measures over all targets, of the seed that moves them most.
    """

    probes: Probes
    said: Said
    noise: dict[str, np.ndarray]
    rounding: Measures


def expected_of(
    model: PreTrainedModel, answers: Answers, evaluation: Evaluation, probes: Probes
) -> Expected:
    """Evaluate a reference's probes, and all of it again with float32 rounding otherwise.

    Args:
        model: The eager reference (``caliport.export.reference.folded.reference``).
        answers: Its answers.
        evaluation: Prompts and targets.
        probes: What else is asked.
    """
    said = Said(answers, eager_echo(model, probes))
    noise, measures = [], []
    positions = sum(map(len, answers.logits)) + len(said.echo.sweep)
    inputs = positions * sum(layer.in_features for layer in _linears(model))
    for seed in range(1, 1 + min(max(-(-_ROUNDED // max(inputs, 1)), _SEEDS[0]), _SEEDS[1])):
        with jittered(model, seed):
            again = eager_answers(model, f"{answers.name}, jittered", evaluation, write=False)
            noise.append(apart(said, Said(again, eager_echo(model, probes, full=False))))
        measures.append(compare(answers.logits, again.logits, evaluation.targets))
    return Expected(
        probes,
        said,
        {name: np.concatenate([part[name] for part in noise]) for name in noise[0]},
        max(measures, key=lambda found: found.kl),
    )


def apart(reference: Said, found: Said) -> dict[str, np.ndarray]:
    """Distances at each position, by what was run: ``prefill`` and ``decode``.

    Short sequences count as prefill; what was said to a full context is left out. Without a
    prompt of two targets there is no ``decode``.
    """

    def rows(said: Said, which: slice) -> list[np.ndarray]:
        return [logits[which] for logits in said.answers.logits]

    first, later = slice(0, 1), slice(1, None)
    ours, theirs = ([*rows(said, first), said.echo.sweep] for said in (reference, found))
    parts = {
        "prefill": distances(ours, theirs),
        "decode": distances(rows(reference, later), rows(found, later)),
    }
    return {name: values for name, values in parts.items() if len(values)}


@contextmanager
def jittered(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """While the body runs, inputs of linear layers are off by about four float32 roundings.

    The size is that of a sum's error, not of a single value's: it goes by the root mean square of
    a token's values, so that small ones are changed as much as large ones.
    """
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randn(_BANK, generator=generator)

    def change(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        values = args[0]
        size = values.square().mean(-1, keepdim=True).sqrt()
        start = int(torch.randint(len(bank), (1,), generator=generator))
        parts = [bank[start:]]
        while sum(map(len, parts)) < values.numel():
            parts.append(bank)
        noise = torch.cat(parts)[: values.numel()].view_as(values)
        return (values + _JITTER * size * noise, *args[1:])

    hooks = [layer.register_forward_pre_hook(change, prepend=True) for layer in _linears(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]
