"""Measures between the logits of a reference and those of something that should equal it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from caliport.validation.records.gate import Measures
from caliport.validation.runners.runner import Runner

_LARGEST_LOSS = 700.0  # exp() of more overflows float64
EXACT = 1e-6
"""Distances of float32 logits below this say nothing."""


class NotFinite(Exception):
    """A runner gave logits that are NaN or infinite; the message says which and where."""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64, same shape as ``logits`` [..., vocab]."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl_divergence(reference: np.ndarray, found: np.ndarray) -> np.ndarray:
    """KL(softmax(reference) || softmax(found)) in nats at each position: [n, vocab] to [n].

    Rounding can make it negative by some 1e-17; it is cut at 0, its mathematical bound.
    """
    return _divergence(log_softmax(reference), log_softmax(found))


def _divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)


def compare(
    reference: Sequence[np.ndarray], found: Sequence[np.ndarray], targets: Sequence[Sequence[int]]
) -> Measures:
    """Measure ``found`` against ``reference`` over all positions of all prompts.

    Args:
        reference: For each prompt, logits [n, vocab].
        found: The same shapes.
        targets: For each prompt, the n tokens that come next.

    Raises:
        ValueError: Different shapes, or no position at all.
    """
    worst, kl, agree, loss, reference_loss = 0.0, 0.0, 0, 0.0, 0.0
    positions = 0
    for ours, theirs, tokens in zip(reference, found, targets, strict=True):
        if ours.shape != theirs.shape or len(tokens) != len(ours):
            raise ValueError(
                f"shapes {ours.shape}, {theirs.shape} and {len(tokens)} targets differ"
            )
        if not len(tokens):
            continue
        rows = np.arange(len(tokens))
        p, q = log_softmax(ours), log_softmax(theirs)
        positions += len(tokens)
        worst = max(worst, float(np.abs(ours - theirs).max()))
        kl += float(_divergence(p, q).sum())
        agree += int((ours.argmax(axis=-1) == theirs.argmax(axis=-1)).sum())
        loss -= float(q[rows, list(tokens)].sum())
        reference_loss -= float(p[rows, list(tokens)].sum())
    if not positions:
        raise ValueError("no positions to compare")
    return Measures(
        positions=positions,
        max_abs=worst,
        kl=kl / positions,
        top1=agree / positions,
        perplexity=math.exp(min(loss / positions, _LARGEST_LOSS)),
        reference_perplexity=math.exp(min(reference_loss / positions, _LARGEST_LOSS)),
    )


def distances(reference: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> np.ndarray:
    """Largest difference of two logits at each position, relative to the reference's spread.

    Args:
        reference: For each prompt, logits [n, vocab].
        found: The same shapes.

    Returns:
        float64 [positions], at least ``EXACT``: float32 logits say no more.
    """
    parts = [np.zeros(0)]
    for ours, theirs in zip(reference, found, strict=True):
        parts.append(np.abs(ours - theirs).max(axis=-1) / spread(ours))
    return np.maximum(np.concatenate(parts).astype(np.float64), EXACT)


def spread(logits: np.ndarray) -> np.ndarray:
    """Largest distance of a logit from the mean at each position: [n, vocab] to [n]."""
    centred = logits - logits.mean(axis=-1, keepdims=True)
    return np.asarray(np.maximum(np.abs(centred).max(axis=-1), 1e-30))


def unexplained(found: np.ndarray, noise: np.ndarray, factor: float) -> float:
    """The share of positions that are farther from the reference than rounding explains.

    The largest lead of the noise's distribution over that of the distances, each divided by
    ``factor``: max over x of P(noise ≤ x) − P(found ≤ factor · x), a one-sided Kolmogorov–Smirnov
    statistic. A fault that moves every position by little shows where rounding moves some not at
    all; one that moves many by much shows anywhere.

    Args:
        found: Distances of an artifact.
        noise: Distances that rounding alone makes.
        factor: How much farther is still the same.
    """
    places = np.concatenate([noise, found / factor])
    below_noise = np.searchsorted(np.sort(noise), places, side="right") / len(noise)
    below_found = np.searchsorted(np.sort(found / factor), places, side="right") / len(found)
    return float(max((below_noise - below_found).max(), 0.0))


def trace(runner: Runner, prompt: list[int], targets: Sequence[int]) -> np.ndarray:
    """Logits at every target when the targets are fed whatever the runner would have said.

    Row 0 comes from the prefill of the prompt, row i from the step that reads target i - 1.

    Returns:
        float32 [len(targets), vocab].

    Raises:
        NotFinite: Some logit is NaN or infinite.
    """
    rows = [
        finite(runner.prefill(prompt), f"{runner.name}, after a prompt of {len(prompt)} tokens")
    ]
    for count, token in enumerate(targets[:-1], start=1):
        where = f"{runner.name}, step {count} after a prompt of {len(prompt)} tokens"
        rows.append(finite(runner.step(token), where))
    return np.stack(rows)


def one_by_one(runner: Runner, prompt: Sequence[int]) -> np.ndarray:
    """Logits after a prompt that is fed one token at a time, float32 [vocab].

    Must equal what the prefill of the whole prompt gives; where it does not, positions, the mask
    or the cache are wrong in one of the two.
    """
    runner.reset()
    for token in prompt:
        logits = runner.step(token)
    return finite(logits, f"{runner.name}, prompt of {len(prompt)} tokens fed one by one")


def finite(logits: np.ndarray, where: str) -> np.ndarray:
    """The logits themselves, or ``NotFinite`` with how many are not finite and ``where``."""
    bad = logits.size - int(np.isfinite(logits).sum())
    if bad:
        raise NotFinite(f"{where}: {bad} of {logits.size} logits are NaN or infinite")
    return logits
