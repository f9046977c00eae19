"""From examples to padded batches, in an order that depends on seed and step only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from caliport.core.checkpoints import encode_prompt
from caliport.core.errors import InputError
from caliport.core.model_files.tokenizers import no_panic
from caliport.core.progress import console
from caliport.core.prompts import check_prompt, put_in

IGNORED = -100
_SORTED_BATCHES = 8


@dataclass(frozen=True)
class Encoded:
    """One example as token ids: the prompt, and the target that the model should write."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    pairs: Sequence[tuple[str, str]],
    context: int,
    source: str,
    leave_out_long: bool = False,
    end: int | None = None,
) -> list[Encoded]:
    """Encode (input, output) pairs; the target ends with the token that ends an answer.

    Args:
        tokenizer: The base's tokenizer.
        template: The task's prompt, with ``{input}`` for the example's input.
        pairs: Inputs and outputs as text.
        context: Most tokens of prompt and target together.
        source: Name of the data in errors.
        leave_out_long: Skip examples longer than the context and report how many.
        end: Token that ends an answer (``caliport.core.model_files.answers.answer_end``); None for
            the tokenizer's ``eos_token``.

    Raises:
        InputError: No examples, no ``{input}`` in the template, or examples longer than the
            context, which are never cut; the message says how many.
    """
    if not pairs:
        raise InputError(f"{source}: no examples; expected at least one")
    check_prompt(template, f"{source}: prompt")
    end = tokenizer.eos_token_id if end is None else end
    if end is None:
        raise InputError(f"{source}: the tokenizer has no eos_token, with which answers end")
    encoded = []
    for text, output in pairs:
        prompt = encode_prompt(tokenizer, put_in(template, text))
        with no_panic(tokenizer.name_or_path):
            target = tokenizer.encode(output, add_special_tokens=False)
        encoded.append(Encoded(tuple(prompt), (*target, int(end))))
    long = [len(e.prompt) + len(e.target) for e in encoded]
    over = sum(length > context for length in long)
    if over and leave_out_long and over < len(pairs):
        console.print(
            f"{source}: {over} of {len(pairs)} examples are longer than the context of {context} "
            "tokens and left out"
        )
        return [e for e, length in zip(encoded, long, strict=True) if length <= context]
    if over:
        raise InputError(
            f"{source}: {over} of {len(pairs)} examples are longer than the context of {context} "
            f"tokens (longest {max(long)}, example {long.index(max(long)) + 1}); raise the context "
            "or leave them out"
        )
    return encoded


@dataclass(frozen=True)
class Batch:
    """A left-padded batch, so that the targets are at the right edge of every row.

    Attributes:
        input_ids, attention_mask, position_ids: int64 [batch, length].
        labels: int64 [batch, kept], for the last ``kept`` positions; ``IGNORED`` if not a target.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.position_ids.to(device),
            self.labels.to(device),
        )


def target_count(example: Encoded, prompt_loss: bool = False) -> int:
    """Number of an example's tokens with a loss; its first token is never predicted."""
    predicted = len(example.prompt) + len(example.target) - 1
    return predicted if prompt_loss else min(len(example.target), predicted)


def collate(examples: Sequence[Encoded], pad: int, prompt_loss: bool = False) -> Batch:
    """Pad examples to one length. With ``prompt_loss`` the prompt's tokens are targets too."""
    rows = [list(e.prompt + e.target) for e in examples]
    length = max(map(len, rows))
    kept = length if prompt_loss else max(len(e.target) for e in examples)
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for row, (tokens, example) in enumerate(zip(rows, examples, strict=True)):
        ids[row, length - len(tokens) :] = torch.tensor(tokens)
        mask[row, length - len(tokens) :] = 1
        wanted = target_count(example, prompt_loss)
        labels[row, length - wanted :] = torch.tensor(tokens[len(tokens) - wanted :])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return Batch(ids, mask, positions, labels[:, length - kept :])


class Order:
    """The examples of each step's batch: a new permutation each epoch, decided by the seed.

    Runs of eight batches are sorted by length before they are cut, to reduce padding.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = min(batch_size, len(lengths))
        self._seed = seed
        self._epoch = -1
        self._batches: list[list[int]] = []

    def __getitem__(self, step: int) -> list[int]:
        per_epoch = len(self._lengths) // self._batch_size
        epoch, index = divmod(step, per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[index]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        size, run = self._batch_size, self._batch_size * _SORTED_BATCHES
        batches = []
        for start in range(0, len(order), run):
            near = sorted(order[start : start + run], key=lambda i: self._lengths[i])
            batches += [near[i : i + size] for i in range(0, len(near) - size + 1, size)]
        turn = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[i] for i in turn]
