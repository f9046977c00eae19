"""Is what travels with the program the base's own: tokenizer, chat template, ends of a text?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from caliport.core.checkpoints import eos_ids, load_config, load_tokenizer
from caliport.core.errors import InputError
from caliport.validation.artifact import artifact_form
from caliport.validation.evaluation.prompts import TEXTS
from caliport.validation.gates.stored import Program
from caliport.validation.records.gate import Gate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def packaging_gates(directory: Path, base: str | Path) -> list[Gate]:
    """Hold the files beside the program, and what the program says of itself, to the base's.

    Args:
        directory: An artifact.
        base: A Hugging Face directory or hub name.
    """
    theirs = load_tokenizer(base)
    try:
        ours = _tokenizer(directory)
    except InputError as problem:
        return [_gate("tokenizer", 1, str(problem))]
    ends, expected = sorted(_ends(directory)), sorted(_base_ends(base))
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


def _tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        raise InputError(f"{directory}: no tokenizer can be read ({line})") from error


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


def _ends(directory: Path) -> list[int]:
    """Where the stock runner of the artifact ends a text."""
    runtime, _ = artifact_form(directory)
    if runtime == "onnx":
        config = json.loads((directory / "genai_config.json").read_text(encoding="utf-8"))
        found = config["model"].get("eos_token_id", [])
        return [found] if isinstance(found, int) else [int(token) for token in found]
    return Program(directory / "model.pte").constant_method("get_eos_ids")
