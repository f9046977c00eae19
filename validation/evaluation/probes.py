"""Token sequences that reach what prompts seldom do, and what a model says to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from caliport.core.progress import at
from caliport.validation.evaluation.measures import finite
from caliport.validation.runners.runner import Runner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SWEEP = 192
_LENGTH = 2
_STEPS = 3
SEED = 20240307
_AGAIN = 2
_LONGEST = 1024  # tokens of a context; an eager pass over more takes minutes


@dataclass(frozen=True)
class Probes:
    """What every model is fed beside the prompts.

    Attributes:
        sweep: Short sequences, all of one length, that together contain every token of a small
            vocabulary and evenly spaced ones of a large one. So short, many of them meet no
            rounding edge at all in a small model.
        full: As many tokens as the context holds, or the first 1024 of a longer one.
    """

    sweep: list[list[int]]
    full: list[int]

    @property
    def ends(self) -> list[int]:
        """Where ``full`` is cut: it is read in these pieces, the last ones a token each."""
        size = len(self.full)
        singles = min(_STEPS, size - 1)
        chunks = sorted({(size - singles) * part // 3 for part in (1, 2, 3)} - {0})
        return [*chunks, *range(size - singles + 1, size + 1)]


@dataclass(frozen=True)
class Echo:
    """What a model says to probes.

    Attributes:
        sweep: Logits after each sequence, float32 [sequences, vocab].
        full: Logits after each piece of the whole context, float32 [pieces, vocab].
    """

    sweep: np.ndarray
    full: np.ndarray


def make_probes(vocab_size: int, context: int) -> Probes:
    """The probes of a vocabulary and a context; the same in every run."""
    draw = np.random.default_rng(SEED)
    count = min(_SWEEP, -(-vocab_size // _LENGTH))
    spaced = np.linspace(0, vocab_size - 1, count * _LENGTH).round().astype(int)
    draw.shuffle(spaced)
    length = min(_LENGTH, context)
    sweep = [row[:length].tolist() for row in spaced.reshape(count, _LENGTH)]
    return Probes(sweep, draw.integers(0, vocab_size, min(context, _LONGEST)).tolist())


def eager_echo(model: PreTrainedModel, probes: Probes, full: bool = True) -> Echo:
    """What an eager model says, from whole passes without a cache; ``full`` may be left out."""
    kept = [end - 1 for end in probes.ends]
    at("reading a whole context")
    rows = _logits(model, [probes.full], kept)[0] if full else np.zeros((0, 0), np.float32)
    return Echo(_logits(model, probes.sweep, [len(probes.sweep[0]) - 1])[:, 0], rows)


def runner_echo(runner: Runner, probes: Probes) -> Echo:
    """What a runner says: ``full`` in pieces where it can ``extend``, else by prefill and steps.

    Raises:
        NotFinite: Some logit is NaN or infinite.
    """
    sweep = [
        finite(runner.prefill(tokens), f"{runner.name}, after tokens {tokens}")
        for tokens in probes.sweep
    ]
    return Echo(np.stack(sweep), np.stack(_full(runner, probes)))


def again(runner: Runner, probes: Probes) -> np.ndarray:
    """Logits of some sequences before and after the whole context was read: [2, n, vocab].

    A cache that is truly forgotten leaves both the same.
    """
    few = probes.sweep[:_AGAIN]
    at("reading a whole context again")
    fresh = [runner.prefill(tokens) for tokens in few]
    later = []
    for tokens in few:
        runner.prefill(probes.full[:-1])
        runner.step(probes.full[-1])
        later.append(runner.prefill(tokens))
    return np.stack([np.stack(fresh), np.stack(later)])


def _full(runner: Runner, probes: Probes) -> list[np.ndarray]:
    extend = getattr(runner, "extend", None)
    rows, start = [], 0
    for end in probes.ends:
        piece = probes.full[start:end]
        if start == 0 or (extend is None and len(piece) > 1):
            row = runner.prefill(probes.full[:end])
        else:
            row = runner.step(piece[0]) if len(piece) == 1 else extend(piece)  # type: ignore[misc]
        rows.append(finite(row, f"{runner.name}, after {end} tokens of a full context"))
        start = end
    return rows


def _logits(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], kept: list[int]
) -> np.ndarray:
    import torch

    with torch.no_grad():
        out = model(
            torch.tensor([list(tokens) for tokens in sequences]),
            use_cache=False,
            logits_to_keep=torch.tensor(kept),
        )
    return np.asarray(out.logits.float().numpy())
