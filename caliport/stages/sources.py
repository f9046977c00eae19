"""Training examples of one task: a file, a prompt, and how many are held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from caliport.core.errors import InputError
from caliport.core.prompts import PLAIN, check_prompt
from caliport.data.examples import Example, read_jsonl
from caliport.export.quantization.text import PlainText, TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from caliport.calibrate.training.batches import Encoded
    from caliport.calibrate.training.flix import FeatureSet

Part = Literal["train", "tuning"]


def text_from(path: Path, prompt: str | None = None) -> TextSource:
    """Calibration text from a file: JSON Lines by its name's end, or else plain text.

    Args:
        path: ``.jsonl`` with ``input`` and ``output``, or a text.
        prompt: Prompt around each input of JSON Lines; None for the input alone.
    """
    if path.suffix.lower() != ".jsonl":
        return PlainText(path)
    return Source(path, PLAIN if prompt is None else prompt, leave_out_long=True)


@dataclass(frozen=True)
class Source:
    """Where examples come from.

    Attributes:
        path: JSON Lines.
        prompt: Prompt around each input, with ``{input}``.
        count: Most examples to train on; None: all but those held out.
        tuning: Number of examples held out at the end of the file, to choose learning rates by.
        features: FLix features of these examples; empty: each example names its own.
        leave_out_long: Skip examples longer than the context and report how many, instead of
            refusing them.
    """

    path: Path
    prompt: str
    count: int | None = None
    tuning: int = 0
    features: tuple[str, ...] = ()
    leave_out_long: bool = False

    def __post_init__(self) -> None:
        check_prompt(self.prompt, f"{self.path}: prompt")

    @property
    def settings(self) -> list[Any]:
        """Everything but the path, for the key of a stage."""
        shorter = ["leave out long"] if self.leave_out_long else []
        return [self.prompt, self.count, self.tuning, list(self.features), *shorter]

    def encoded(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, part: Part = "train"
    ) -> list[Encoded]:
        """The examples as token ids.

        Raises:
            InputError: The file is unreadable or empty, examples are longer than the context, or
                the model does not end at the tokenizer's end token.
        """
        return self._encode(self._chosen(part), tokenizer, model)

    def sequences(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> list[tuple[int, ...]]:
        """Token ids of each training example, prompt and answer together.

        Raises:
            InputError: As ``encoded``.
        """
        return [(*e.prompt, *e.target) for e in self.encoded(tokenizer, model)]

    def feature_sets(
        self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, part: Part = "train"
    ) -> list[FeatureSet]:
        """The examples by their features.

        Raises:
            InputError: As ``encoded``, or an example has no features.
        """
        from caliport.calibrate.training.flix import FeatureSet

        groups: dict[tuple[str, ...], list[Example]] = {}
        for number, example in enumerate(self._chosen(part), start=1):
            features = self.features or example.features
            if not features:
                raise InputError(
                    f'{self.path}: example {number} has no "features"; expected a list of names'
                )
            groups.setdefault(features, []).append(example)
        return [
            FeatureSet(features, self._encode(examples, tokenizer, model))
            for features, examples in groups.items()
        ]

    def _chosen(self, part: Part) -> list[Example]:
        examples = read_jsonl(self.path)
        kept = len(examples) - self.tuning
        if kept <= 0:
            raise InputError(
                f"{self.path}: {len(examples)} examples, {self.tuning} of them held out to choose "
                "learning rates by; expected more examples, or a smaller calibration.tuning"
            )
        return examples[kept:] if part == "tuning" else examples[: min(self.count or kept, kept)]

    def _encode(
        self, examples: list[Example], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> list[Encoded]:
        from caliport.calibrate.training.batches import encode
        from caliport.core.checkpoints import eos_ids, longest_context
        from caliport.core.model_files.answers import answer_end, end_trouble

        if trouble := end_trouble(tokenizer, eos_ids(model)):
            raise InputError(trouble)
        end = answer_end(tokenizer, eos_ids(model))
        pairs = [(e.input, e.output) for e in examples]
        context, where = longest_context(model.config), str(self.path)
        return encode(tokenizer, self.prompt, pairs, context, where, self.leave_out_long, end)
