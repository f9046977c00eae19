"""The token that ends an answer: what a base's chat template puts after one, or its end token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from caliport.core.errors import InputError
from caliport.core.files import CONFIG, GENERATION_CONFIG
from caliport.core.model_files.chat_templates import render_chat
from caliport.core.model_files.tokenizers import TOKENIZER_CONFIG, no_panic
from caliport.core.untrusted import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "Answer"


def answer_end(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> int | None:
    """The token with which answers end: that of the chat template, or ``eos_token``.

    Gemma 3's template puts ``<end_of_turn>`` after an answer, Phi-3's ``<|end|>``; the tokenizers'
    ``eos_token`` is another. Of the two, the first at which the model stops counts.

    Args:
        tokenizer: A base's.
        ends: Token ids at which the base stops (``caliport.core.checkpoints.eos_ids``).

    Returns:
        The id; ``eos_token``'s if the model stops at neither; None if there is none.
    """
    eos = tokenizer.eos_token_id
    found = next((end for end in (_after_answer(tokenizer), eos) if end in ends), eos)
    return None if found is None else int(found)


def end_trouble(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> str | None:
    """Why answers would not end as ``answer_end`` ends them; None if they do.

    Args:
        tokenizer: A base's.
        ends: As for ``answer_end``.
    """
    where, end = tokenizer.name_or_path or "the tokenizer", answer_end(tokenizer, ends)
    if end is None:
        return (
            f"{where}: the tokenizer has no eos_token, with which answers end in training; set it "
            f"in {TOKENIZER_CONFIG}"
        )
    if end in ends:
        return None
    stops = f"stops at {', '.join(map(str, ends[:8]))}" if ends else "has no end token"
    return (
        f"{where}: the tokenizer's eos_token is {end} ({shown(tokenizer.eos_token)}), with which "
        f"answers end in training, but the model {stops}; add {end} to eos_token_id in "
        f"{GENERATION_CONFIG} and {CONFIG}, or correct eos_token in {TOKENIZER_CONFIG}"
    )


def _after_answer(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first token that the chat template puts after an answer; None without any."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _ANSWER}]
    try:
        after = render_chat(tokenizer, turns, asks=False).rpartition(_ANSWER)[2].lstrip()
    except InputError:
        return None  # a template that takes no answers
    with no_panic(tokenizer.name_or_path):
        ids = tokenizer.encode(after, add_special_tokens=False) if after else []
    return ids[0] if ids else None
