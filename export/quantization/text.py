"""Calibration text: what a quantizer measures the inputs of layers on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from caliport.core.errors import InputError
from caliport.core.model_files.tokenizers import no_panic
from caliport.core.untrusted import check_regular

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 8192
"""Default number of tokens."""
INTEGERS_KEY = "key.json"
"""The file that marks a directory of calibrated integers, and says what they depend on."""
_PIECE = 512  # tokens of plain text that are read as one sequence
_FEWEST = 64
_BYTES_A_TOKEN = 16
_MOST_BYTES = 2**30


class TextSource(Protocol):
    """Examples of a task, or a text, from one file."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def settings(self) -> list[Any]:
        """Everything but the path that decides the examples."""
        ...

    def sequences(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> Sequence[tuple[int, ...]]:
        """Token ids of each example, prompt and answer together.

        Raises:
            InputError: The file cannot be read, or has no examples.
        """
        ...


@dataclass(frozen=True)
class PlainText:
    """A file of plain text, read in pieces of at most 512 tokens."""

    path: Path

    @property
    def settings(self) -> list[Any]:
        """Everything but the path that decides the examples."""
        return ["plain text"]

    def sequences(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> Sequence[tuple[int, ...]]:
        """Token ids of the beginning of the text.

        Raises:
            InputError: The file is missing, too large, not UTF-8, or has too little text.
        """
        check_regular(self.path, _MOST_BYTES)
        piece = min(_PIECE, int(model.config.max_position_embeddings))
        try:
            with self.path.open(encoding="utf-8") as stream:
                text = stream.read(64 * TOKENS * _BYTES_A_TOKEN)
        except UnicodeDecodeError:
            raise InputError(f"{self.path}: not UTF-8 text") from None
        with no_panic(tokenizer.name_or_path):
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if len(ids) < _FEWEST:
            raise InputError(
                f"{self.path}: {len(ids)} tokens, expected at least {_FEWEST} to calibrate on"
            )
        return [tuple(ids[i : i + piece]) for i in range(0, len(ids), piece)]


@dataclass(frozen=True)
class CalibrationText:
    """Where calibration text comes from.

    Attributes:
        sources: By composition of a bundle; by the empty name for a fold or a base alone.
        tokens: Most tokens of all sources together; each gives an equal share, its examples
            spread evenly over the file.
        alone: The base of a bundle runs on it by itself, without its compositions: its integers
            are then known before the compositions are, which can be trained through them.
    """

    sources: Mapping[str, TextSource]
    tokens: int = TOKENS
    alone: bool = False

    def __post_init__(self) -> None:
        if self.tokens < _FEWEST:
            raise InputError(
                f"calibration tokens: found {self.tokens}, expected at least {_FEWEST}"
            )

    def inputs(self) -> dict[str, Path | str]:
        """The files, by their labels in a manifest."""
        return {
            f"calibration text {name}".rstrip(): source.path
            for name, source in self.sources.items()
        }

    def settings(self) -> dict[str, Any]:
        """Everything besides the files that decides the sequences, for a manifest."""
        return {
            "tokens": self.tokens,
            "sources": {name: source.settings for name, source in self.sources.items()},
            **({"alone": True} if self.alone else {}),
        }

    def sequences(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> dict[str, list[tuple[int, ...]]]:
        """Token ids to run the model on, by composition.

        Raises:
            InputError: A file that cannot be read, or too little text.
        """
        return {name: taken for name, (taken, _) in self._split(tokenizer, model).items()}

    def held_out(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, tokens: int
    ) -> list[tuple[int, ...]]:
        """Token ids to measure on, of examples that ``sequences`` leaves out.

        Args:
            tokenizer: The base's.
            model: The decoder, for its longest sequence.
            tokens: Most tokens of all sources together.

        Raises:
            InputError: A file that cannot be read, or too few examples.
        """
        share = tokens // len(self.sources)
        found = []
        for name, (_, left) in self._split(tokenizer, model).items():
            kept = cut([left[i] for i in _spread(left, share)], share)
            if sum(map(len, kept)) < _FEWEST:
                raise InputError(
                    f"{self.sources[name].path}: {self.tokens} calibration tokens take all of it, "
                    "and nothing is left to measure layers on; expected a longer text, or fewer "
                    "tokens"
                )
            found += kept
        return found

    def _split(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> dict[str, tuple[list[tuple[int, ...]], list[tuple[int, ...]]]]:
        """By composition, the examples to calibrate on, and the others."""
        share = self.tokens // len(self.sources)
        longest = int(model.config.max_position_embeddings)
        found = {}
        for name, source in self.sources.items():
            examples = [ids[:longest] for ids in source.sequences(tokenizer, model)]
            chosen = _spread(examples, share)
            others = sorted(set(range(len(examples))) - set(chosen))
            found[name] = cut([examples[i] for i in chosen], share), [examples[i] for i in others]
        return found


def _spread(examples: Sequence[tuple[int, ...]], tokens: int) -> list[int]:
    """Places of examples from all over the file with about the given number of tokens in all."""
    mean = sum(map(len, examples)) / max(1, len(examples))
    count = min(len(examples), max(1, round(tokens / max(1, mean))))
    return [i * len(examples) // count for i in range(count)]


def cut(examples: Sequence[tuple[int, ...]], tokens: int) -> list[tuple[int, ...]]:
    """The first examples, with the given number of tokens in all."""
    kept: list[tuple[int, ...]] = []
    for example in examples:
        if tokens > 0:
            kept.append(example[:tokens])
            tokens -= len(example)
    return kept
