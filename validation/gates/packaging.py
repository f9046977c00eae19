"""Are the files beside the program the base's own: tokenizer, chat template, end of text?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from caliport.core.checkpoints import eos_ids, load_config, load_tokenizer
from caliport.core.errors import InputError
from caliport.export.artifact import Artifact
from caliport.export.package.tokenizer import read_tokenizer
from caliport.validation.evaluation.prompts import TEXTS
from caliport.validation.records.gate import Gate
from caliport.validation.runners import engine as engines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def packaging_gates(artifact: Artifact, base: str | Path) -> list[Gate]:
    """Compare tokenizer, chat template and end of text with the base's.

    Args:
        artifact: One of ours.
        base: A Hugging Face directory or hub name.
    """
    theirs = load_tokenizer(base)
    try:
        ours = read_tokenizer(artifact.directory)
    except InputError as problem:
        return [_gate("tokenizer", 1, str(problem))]
    found = engines.get(artifact.runtime).ends(artifact)
    ends, expected = sorted(found), sorted(_base_ends(base))
    return [
        _gate("tokenizer", *_texts(ours, theirs)),
        _gate(
            "chat template",
            int(ours.chat_template != theirs.chat_template),
            "a prompt is rendered as the base renders it",
        ),
        _gate("ends", int(ends != expected), f"a text ends at {ends}, the base's at {expected}"),
    ]


def _gate(name: str, found: int, reason: str) -> Gate:
    return Gate(
        name=name,
        measure="differences from the base's",
        limit=0,
        found=found,
        passed=not found,
        stage="packaging",
        reason=reason,
    )


def _texts(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> tuple[int, str]:
    """How many texts, special tokens and entries of the vocabulary differ."""
    texts = sum(ours.encode(text) != theirs.encode(text) for text in TEXTS)
    mine, base = ours.get_vocab(), theirs.get_vocab()
    entries = sum(mine.get(token) != number for token, number in base.items())
    entries += len(mine.keys() - base.keys())
    special = sum(
        getattr(ours, name) != getattr(theirs, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    )
    reason = (
        f"{texts} of {len(TEXTS)} texts are encoded otherwise, {entries} entries of the vocabulary "
        f"and {special} special tokens differ"
    )
    return texts + entries + special, reason


def _base_ends(base: str | Path) -> list[int]:
    from caliport.export.decoder.skeleton import empty

    config, generation = load_config(base)
    model = empty(config)
    if generation is not None:
        model.generation_config = generation
    return eos_ids(model)
