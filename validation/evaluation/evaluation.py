"""A set of prompts and what each model says to it, computed once and shared by all artifacts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from caliport.core.checkpoints import encode_prompt, eos_ids, longest_context, render_prompt
from caliport.core.errors import InputError
from caliport.core.model_files.answers import answer_end
from caliport.core.progress import at
from caliport.validation.evaluation import bootstrap, probes, quality
from caliport.validation.evaluation.measures import trace
from caliport.validation.evaluation.prompts import SEED, TEXTS, builtin_prompts
from caliport.validation.records.reports import Asked
from caliport.validation.runners.eager import EagerRunner
from caliport.validation.runners.runner import Runner, greedy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BATCH = 8


@dataclass(frozen=True)
class Evaluation:
    """What every model is asked.

    Attributes:
        tokenizer: The base's.
        prompts: Token ids, each ready to be answered.
        texts: The text of each prompt as a stock runner is given it; None where the tokens are
            no text.
        references: What should be answered, or None where that is not known.
        targets: Tokens that every model is fed after the prompt, so that logits are compared at
            the same positions: the reference's, or what fp32 writes.
        ends: Token ids that end an answer.
        max_new_tokens: Longest answer, in tokens.
        written: The answers of fp32, where they had to be written for the targets.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    prompts: list[list[int]] = field(repr=False)
    texts: list[str | None] = field(repr=False)
    references: list[str] | None = field(repr=False)
    targets: list[list[int]] = field(repr=False)
    ends: frozenset[int]
    max_new_tokens: int
    written: list[list[int]] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Answers:
    """What one model says: logits at every target, [targets, vocab] a prompt, and its own text.

    ``generated`` is None for a model whose text is not wanted, such as the base. ``streams`` are
    residual streams at every target, [layers + 1, targets, hidden] a prompt, where asked for.
    """

    name: str
    logits: list[np.ndarray] = field(repr=False)
    generated: list[list[int]] | None = field(repr=False)
    streams: list[np.ndarray] | None = field(default=None, repr=False)


def make_evaluation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: list[str] | None = None,
    references: list[str] | None = None,
    *,
    max_new_tokens: int = 24,
    positions: int = 24,
    places: Sequence[str] = (),
) -> Evaluation:
    """Prepare an evaluation, from inputs (one user turn each) or from the built-in prompts.

    Args:
        model: The fp32 composition. Decides the context, the ends and, without references, the
            targets.
        tokenizer: The base's.
        inputs: Texts of user turns; None for the built-in set.
        references: One answer an input.
        max_new_tokens: Longest greedy answer, in tokens.
        positions: Most targets a prompt.
        places: Where each input stands, for messages; empty: they are numbered.

    Raises:
        InputError: No inputs, numbers that differ, or an input longer than the context allows.
    """
    context = longest_context(model.config)
    if inputs is None:
        texts, prompts = _builtin(model, tokenizer, context - max(max_new_tokens, positions))
        references = None
    else:
        texts = [render_prompt(tokenizer, text) for text in inputs]
        prompts = [encode_prompt(tokenizer, text) for text in inputs]
    if not prompts or (references is not None and len(references) != len(prompts)):
        wanted = "at least one" if references is None else f"{len(references)}, one a reference"
        raise InputError(f"{len(prompts)} prompts to validate with, expected {wanted}")
    for number, prompt in enumerate(prompts):
        if len(prompt) >= context:
            where = places[number] if places else f"prompt {number + 1} of {len(prompts)}"
            raise InputError(
                f"{where}: a prompt of {len(prompt)} tokens leaves no room in the context of "
                f"{context}; leave it out"
            )
    if references is None:
        targets = quality.generate(
            model, tokenizer, prompts, max_new_tokens=positions, batch_size=_BATCH
        )
    else:
        end = answer_end(tokenizer, eos_ids(model))
        targets = [quality.target_tokens(tokenizer, text, end) for text in references]
    room = [min(positions, context - len(prompt)) for prompt in prompts]
    ends = eos_ids(model) or [i for i in [tokenizer.eos_token_id] if i is not None]
    return Evaluation(
        tokenizer,
        prompts,
        list(texts),
        references,
        [target[:most] for target, most in zip(targets, room, strict=True)],
        frozenset(ends),
        max_new_tokens,
        targets if references is None and positions == max_new_tokens else None,
    )


def asked_of(evaluation: Evaluation) -> Asked:
    """What an evaluation asks, as it is recorded."""
    return Asked(
        prompts=_hash(evaluation.prompts),
        targets=_hash(evaluation.targets),
        max_new_tokens=evaluation.max_new_tokens,
        seeds={"built-in prompts": SEED, "probes": probes.SEED, "bootstrap": bootstrap.SEED},
    )


def _hash(tokens: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def eager_answers(
    model: PreTrainedModel,
    name: str,
    evaluation: Evaluation,
    write: bool = True,
    streams: bool = False,
) -> Answers:
    """Answers of an eager model, from whole passes without a cache.

    Args:
        model: In eval mode, quantized or not.
        name: Names it in reasons.
        evaluation: What is asked.
        write: Whether its own text is wanted.
        streams: Whether its residual streams are.

    Raises:
        InputError: Some logit is NaN or infinite: a reference must be sound.
    """
    runner = EagerRunner(model, name)
    logits = []
    pairs = list(zip(evaluation.prompts, evaluation.targets, strict=True))
    for number, (prompt, target) in enumerate(pairs):
        at(f"reading prompts, {name}", number, len(pairs))
        rows = runner.logits([*prompt, *target[:-1]], last=max(1, len(target)))
        if not np.isfinite(rows).all():
            raise InputError(
                f"{name}: logits are NaN or infinite before any export; check the weights"
            )
        logits.append(rows)
    generated = None
    if write:
        at(f"writing, {name}")
        generated = quality.generate(
            model,
            evaluation.tokenizer,
            evaluation.prompts,
            max_new_tokens=evaluation.max_new_tokens,
            batch_size=_BATCH,
        )
    return Answers(name, logits, generated, _streams(model, evaluation) if streams else None)


def _streams(model: PreTrainedModel, evaluation: Evaluation) -> list[np.ndarray]:
    """The residual stream after the embedding and after each layer, at every target.

    Returns:
        For each prompt float32 [layers + 1, targets, hidden].
    """
    import torch

    config, found = model.config.get_text_config(), []
    before = getattr(config, "tie_last_hidden_states", None)
    # transformers 5 would give the last one after the final norm, beside others before any norm.
    config.tie_last_hidden_states = False
    for prompt, target in zip(evaluation.prompts, evaluation.targets, strict=True):
        tokens = torch.tensor([[*prompt, *target[:-1]]])
        with torch.no_grad():
            out = model(tokens, use_cache=False, output_hidden_states=True)
        rows = torch.stack([stream[0, len(prompt) - 1 :] for stream in out.hidden_states])
        found.append(np.asarray(rows.float().numpy()))
    config.tie_last_hidden_states = before
    return found


def texts_of(evaluation: Evaluation, answers: Answers) -> list[str]:
    """The texts that a model wrote, without special tokens."""
    assert answers.generated is not None
    return quality.decode(evaluation.tokenizer, answers.generated)


def runner_answers(runner: Runner, evaluation: Evaluation) -> Answers:
    """Answers of a runner, by prefill and steps.

    Raises:
        NotFinite: Some logit is NaN or infinite.
        InputError: A prompt and its targets do not fit the runner's context.
    """
    logits, generated = [], []
    pairs = list(zip(evaluation.prompts, evaluation.targets, strict=True))
    for number, (prompt, target) in enumerate(pairs):
        at(f"asking {runner.name}", number, len(pairs))
        if len(prompt) + len(target) - 1 > runner.context:
            raise InputError(
                f"{runner.name}: a prompt of {len(prompt)} and {len(target)} further tokens exceed "
                f"its context of {runner.context}; export with a longer one or leave it out"
            )
        logits.append(trace(runner, prompt, target))
        generated.append(greedy(runner, prompt, evaluation.max_new_tokens, evaluation.ends))
    return Answers(runner.name, logits, generated)


def _builtin(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, room: int
) -> tuple[list[str | None], list[list[int]]]:
    """The built-in texts that fit and that the tokenizer can write, then token sequences."""
    encoded = [(render_prompt(tokenizer, t), encode_prompt(tokenizer, t)) for t in TEXTS]
    fitting = [(text, tokens) for text, tokens in encoded if len(tokens) <= room]
    rows = min(int(model.config.get_text_config().vocab_size), len(tokenizer))
    drawn = builtin_prompts(rows, tokenizer.all_special_ids, longest=min(48, room))
    texts: list[str | None] = [*(text for text, _ in fitting), *(None for _ in drawn)]
    return texts, [*(tokens for _, tokens in fitting), *drawn]
