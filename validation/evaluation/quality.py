"""Task quality: loss of the reference, greedy generations, ROUGE-L, chrF and weighted ROUGE."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from caliport.core.checkpoints import eos_ids
from caliport.core.errors import InputError
from caliport.core.model_files.answers import answer_end
from caliport.core.patching import swapped
from caliport.core.progress import Advance

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METRICS = ("rougeL", "chrf", "weighted_rouge")
_WEIGHTS = {"rouge1": 1 / 6, "rouge2": 1 / 3, "rouge3": 1 / 2}
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Score:
    """What a method wrote and how good it is.

    Attributes:
        loss: Mean cross-entropy of the references' tokens, their end included, in nats; None
            where no single model wrote the outputs (multi-step).
        rougeL: Mean ROUGE-L F1, 0 to 100.
        chrf: Corpus chrF (sacrebleu), 0 to 100.
        outputs: What was written, in the order of the prompts.
        examples: For each metric, the score of each example, 0 to 100; under ``loss`` its mean
            cross-entropy.
    """

    loss: float | None
    rougeL: float
    chrf: float
    outputs: list[str]
    examples: dict[str, list[float]]


class _UnicodeWords:
    """Words of any script. rouge-score's own tokenizer keeps a-z and 0-9 and drops é, ñ, ß."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())


def metric(name: str, hypotheses: Sequence[str], references: Sequence[str]) -> list[float]:
    """Score each hypothesis against its reference, 0 to 100.

    ``rougeL`` is the F1 of the longest common subsequence of lower-cased words (Lin, 2004),
    ``chrf`` the character n-gram F-score (Popović, 2015; sacrebleu's defaults),
    ``weighted_rouge`` that of the function below.

    Raises:
        InputError: Unknown metric or different numbers of texts.
    """
    if len(hypotheses) != len(references):
        raise InputError(f"{len(hypotheses)} outputs for {len(references)} references")
    if name == "rougeL":
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"], tokenizer=_UnicodeWords())
        pairs = zip(references, hypotheses, strict=True)
        return [100 * float(scorer.score(r, h)["rougeL"].fmeasure) for r, h in pairs]
    if name == "chrf":
        from sacrebleu.metrics import CHRF

        chrf = CHRF()
        pairs = zip(hypotheses, references, strict=True)
        return [float(chrf.sentence_score(h, [r]).score) for h, r in pairs]
    if name == "weighted_rouge":
        return [weighted_rouge(h, r) for h, r in zip(hypotheses, references, strict=True)]
    raise InputError(f"metric {name!r} is not known, expected one of {', '.join(METRICS)}")


def weighted_rouge(prediction: str, reference: str) -> float:
    """Weighted ROUGE of a reply, 0 to 100: R1/6 + R2/3 + R3/2 (arXiv 2507.16083).

    Rn is the F1 of the word n-grams in common (Lin, 2004), of lower-cased words of any script. A
    text of fewer than n words has no n-gram and scores 0 there, so that a single word scores at
    most 100/6.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(_WEIGHTS), tokenizer=_UnicodeWords())
    found = scorer.score(reference, prediction)
    return 100 * sum(weight * float(found[n].fmeasure) for n, weight in _WEIGHTS.items())


def judge(outputs: list[str], references: list[str], loss: float | None) -> Score:
    """Score finished outputs, such as those of a chain of models.

    Raises:
        InputError: No example, or different numbers of texts.
    """
    from sacrebleu.metrics import CHRF

    if not references:
        raise InputError("no examples to score; expected at least one")
    examples = {name: metric(name, outputs, references) for name in METRICS}
    return Score(
        loss=loss,
        rougeL=sum(examples["rougeL"]) / len(references),
        chrf=float(CHRF().corpus_score(outputs, [references]).score),
        outputs=outputs,
        examples=examples,
    )


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    references: list[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Advance | None = None,
) -> Score:
    """Score a transformers model on prompts with one reference each.

    Args:
        model: In eval mode.
        tokenizer: The model's.
        prompts: Token ids, ready to be answered.
        references: What should be answered, as text.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Examples a pass.
        progress: Called with the number of examples done.

    Raises:
        InputError: No example, or different numbers of prompts and references.
    """
    if len(prompts) != len(references):
        raise InputError(f"{len(prompts)} prompts for {len(references)} references")
    loss, losses = reference_loss(model, tokenizer, prompts, references, batch_size)
    tokens = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    found = judge(decode(tokenizer, tokens), references, loss)
    return replace(found, examples={**found.examples, "loss": losses})


def reference_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    references: Sequence[str],
    batch_size: int,
) -> tuple[float, list[float]]:
    """Mean cross-entropy of the references' tokens, their end included, in nats; and by example.

    The mean is over tokens, so that a long example weighs more than a short one.
    """
    end = answer_end(tokenizer, eos_ids(model))
    targets = [target_tokens(tokenizer, text, end) for text in references]
    losses = target_losses(model, prompts, targets, batch_size)
    return float(np.average(losses, weights=[len(target) for target in targets])), losses


def target_tokens(tokenizer: PreTrainedTokenizerBase, text: str, end: int | None) -> list[int]:
    """Tokens that a model must write for ``text``, the one that ends an answer included, if any."""
    tokens = list(tokenizer.encode(text, add_special_tokens=False))
    return tokens if end is None else [*tokens, end]


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Sequence[int]]) -> list[str]:
    """Texts without special tokens and without space around them."""
    return [str(tokenizer.decode(list(t), skip_special_tokens=True)).strip() for t in tokens]


def target_losses(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    batch_size: int,
) -> list[float]:
    """Each example's mean cross-entropy of its target tokens, in nats."""
    import torch
    from torch.nn.functional import cross_entropy

    losses = [0.0] * len(targets)
    for batch in _batches(
        [len(p) + len(t) for p, t in zip(prompts, targets, strict=True)], batch_size
    ):
        rows = [[*prompts[i], *targets[i]] for i in batch]
        kept = max(len(targets[i]) for i in batch)
        ids, mask = _left_pad(rows)
        labels = torch.full((len(batch), kept), -100)
        for row, i in enumerate(batch):
            labels[row, kept - len(targets[i]) :] = torch.tensor(targets[i])
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(
                ids, attention_mask=mask, position_ids=positions, logits_to_keep=kept + 1
            ).logits[:, :-1]
        found = cross_entropy(logits.float().transpose(1, 2), labels, reduction="none").sum(dim=1)
        for i, total in zip(batch, found.tolist(), strict=True):
            losses[i] = total / len(targets[i])
    return losses


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Advance | None = None,
) -> list[list[int]]:
    """Greedy continuations of left-padded batches, in the order of the prompts.

    Returns:
        Token ids without the prompt; the end-of-sequence token, where one came, is the last.
    """
    import torch
    from transformers import GenerationConfig

    ends = eos_ids(model) or [i for i in [tokenizer.eos_token_id] if i is not None]
    outputs: list[list[int]] = [[] for _ in prompts]
    done = 0
    for batch in _batches([len(p) for p in prompts], batch_size):
        ids, mask = _left_pad([list(prompts[i]) for i in batch])
        # The base's own settings, such as a penalty for repetition, are not those of a runner.
        with torch.no_grad(), swapped(model, "generation_config", GenerationConfig()):
            written = model.generate(  # type: ignore[operator]
                ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=ends[0] if ends else 0,
                eos_token_id=ends or None,
            )
        for i, tokens in zip(batch, written[:, ids.shape[1] :].tolist(), strict=True):
            stop = next((n for n, token in enumerate(tokens, start=1) if token in ends), None)
            outputs[i] = tokens[:stop]
        done += len(batch)
        if progress is not None:
            progress(done, "")
    return outputs


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of near length, so that little is padding."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _left_pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 [rows, longest]. What is masked may be any token."""
    import torch

    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, length - len(tokens) :] = torch.tensor(tokens)
        mask[row, length - len(tokens) :] = 1
    return ids, mask
