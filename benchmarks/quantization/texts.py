"""Texts that are measured and texts that are calibrated on; they never overlap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from caliport.core.checkpoints import encode_prompt
from caliport.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT = "Summarize this conversation:\n{input}"
_WINDOW = 512


def calibration(data: Path, out: Path) -> Path:
    """DialogSum's dev dialogues with their summaries as JSON Lines, written to ``out``."""
    rows = _dialogues(data, "dev")
    pairs = [{"input": PROMPT.replace("{input}", d), "output": s} for d, s in rows]
    lines = [json.dumps(pair, ensure_ascii=False) for pair in pairs]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def dialogues(data: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """DialogSum's first test dialogues in the chat template, with their first summaries."""
    found = []
    for dialogue, summary in _dialogues(data, "test")[:count]:
        prompt = encode_prompt(tokenizer, PROMPT.replace("{input}", dialogue))
        answer = tokenizer.encode(summary, add_special_tokens=False)
        found.append([*prompt, *answer])
    return found


def summaries(
    data: Path, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[tuple[list[int], list[str]]]:
    """Prompts of DialogSum's last test dialogues with all their reference summaries."""
    rows = _rows(data, "test")[-count:]
    keys = ("summary1", "summary2", "summary3")
    return [
        (
            encode_prompt(tokenizer, PROMPT.replace("{input}", row["dialogue"])),
            [row[key] for key in keys if row.get(key)] or [row["summary"]],
        )
        for row in rows
    ]


def articles(data: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """Windows of 512 tokens of WikiText-2's test set, evenly spread over it."""
    path = next(iter(sorted((data / "wikitext2").glob("*test*"))), None)
    if path is None:
        raise InputError(f"{data}: expected wikitext2/ with the test set")
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    windows = [ids[i : i + _WINDOW] for i in range(0, len(ids) - _WINDOW, _WINDOW)]
    return [windows[i * len(windows) // count] for i in range(count)]


def _dialogues(data: Path, split: str) -> list[tuple[str, str]]:
    rows = _rows(data, split)
    return [(row["dialogue"], row.get("summary") or row["summary1"]) for row in rows]


def _rows(data: Path, split: str) -> list[dict[str, str]]:
    path = data / "dialogsum" / f"dialogsum.{split}.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected DialogSum") from None
