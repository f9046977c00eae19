"""How far an artifact is from the float model: by its weights, its logits and what it writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.quantization.llama import LlamaRunner
from benchmarks.quantization.peers import interpreter
from benchmarks.quantization.rows import CONTEXT, Row
from benchmarks.quantization.texts import articles, dialogues, summaries

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from caliport.validation.runners.runner import Runner

_NEW = 80  # tokens of a summary


@dataclass(frozen=True)
class Amount:
    """How much is measured: texts of each kind, dialogues for the runtime, summaries."""

    count: int
    slice: int
    summaries: int


class Meter:
    """Measures artifacts against one float model on the same texts.

    Args:
        base: The model: a directory or a ``.gguf`` file.
        data: The directory with dialogsum/ and wikitext2/.
        amount: How much.

    Attributes:
        amount: How much.
    """

    def __init__(self, base: Path, data: Path, amount: Amount) -> None:
        self.amount = amount
        self._base, self._data = base, data
        self._known: dict[tuple[int, ...], Tensor] = {}

    @cached_property
    def _model(self) -> PreTrainedModel:
        from caliport.core.checkpoints import load_base

        return load_base(self._base)

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        from caliport.core.checkpoints import load_tokenizer

        return load_tokenizer(self._base)

    @cached_property
    def _dialogues(self) -> list[list[int]]:
        return dialogues(self._data, self._tokenizer, self.amount.count)

    def weights(self, row: Row, directory: Path) -> dict[str, dict[str, float]]:
        """Distances with the artifact's own weights in float arithmetic; empty if unreadable."""
        model = self._own_weights(row, directory)
        if model is None:
            return {}
        texts = {
            "dialogues": self._dialogues,
            "articles": articles(self._data, self._tokenizer, self.amount.count),
        }
        return {
            name: self.distance(ids, lambda x: logits_of(model, x)) for name, ids in texts.items()
        }

    def artifact(self, runner: Runner) -> dict[str, float]:
        """Distance with the logits of the artifact in its runtime, one token at a time."""
        import numpy as np
        import torch

        def run(ids: Sequence[int]) -> Tensor:
            rows = [runner.prefill([ids[0]]), *(runner.step(token) for token in ids[1:])]
            return torch.from_numpy(np.stack(rows))

        return self.distance(self._dialogues[: self.amount.slice], run)

    def summaries(self, runner: Runner) -> dict[str, list[float]]:
        """ROUGE-L of greedy summaries, a number for each dialogue: the mean over its references."""
        from caliport.core.checkpoints import eos_ids
        from caliport.validation.evaluation.quality import metric
        from caliport.validation.runners.runner import greedy

        scores = []
        ends = eos_ids(self._model)
        for prompt, references in summaries(self._data, self._tokenizer, self.amount.summaries):
            tokens = greedy(runner, prompt, _NEW, ends)
            text = str(self._tokenizer.decode(tokens, skip_special_tokens=True))
            found = metric("rougeL", [text] * len(references), references)
            scores.append(sum(found) / len(found))
        return {"rougeL": scores}

    def open(self, row: Row, directory: Path, peers: Path) -> Runner:
        """The artifact in its runtime."""
        if row.runtime == "llama.cpp":
            python, vocabulary = interpreter(row.tool, peers), self._model.config.vocab_size
            return LlamaRunner(directory / "model.gguf", python, 2, CONTEXT, vocabulary)
        from caliport.api import load

        return load(directory)

    def _own_weights(self, row: Row, directory: Path) -> PreTrainedModel | None:
        """A float model with exactly the weights that an artifact holds; None if unreadable."""
        if row.runtime == "llama.cpp":
            import torch
            from transformers import AutoModelForCausalLM

            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                directory, gguf_file="model.gguf", dtype=torch.float32
            )
            return model.eval()
        if row.tool != "caliport":
            return None
        from caliport.export.artifact import Artifact
        from caliport.export.quantization.tensors import dequantize
        from caliport.export.reference.folded import eager
        from caliport.validation.runners.weights import ArtifactIntegers

        artifact = Artifact.read(directory)
        if artifact.precision == "fp32":
            return self._model
        known = ArtifactIntegers(artifact, self._base) if artifact.calibrated else None
        return dequantize(eager(self._base, None, artifact.quantization, known))

    def distance(
        self, texts: Sequence[Sequence[int]], logits: Callable[[Sequence[int]], Tensor]
    ) -> dict[str, float]:
        """Mean KL in nats, share of equal favourites, and perplexity over the float model's."""
        from torch.nn.functional import kl_div

        kl = same = count = lost = 0.0
        for ids in texts:
            if tuple(ids) not in self._known:
                self._known[tuple(ids)] = logits_of(self._model, ids).log_softmax(-1)
            first, second = self._known[tuple(ids)], logits(ids).log_softmax(-1)
            kl += float(kl_div(second, first, log_target=True, reduction="sum"))
            same += int((first.argmax(-1) == second.argmax(-1)).sum())
            rows, following = range(len(ids) - 1), list(ids[1:])
            lost += float((first[rows, following] - second[rows, following]).sum())
            count += len(ids)
        return {
            "kl": kl / count,
            "top1": same / count,
            "perplexity": math.exp(lost / (count - len(texts))),
            "tokens": count,
        }


def logits_of(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Logits after every token, float32 [tokens, vocab]."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()
