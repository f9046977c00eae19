"""The base, the adapter and the prompts that every faulty artifact should have been made from."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from caliport.core.checkpoints import load_tokenizer
from caliport.export.artifact import Artifact
from caliport.export.quantization.tensors import dequantize
from caliport.export.reference.folded import eager, reference
from caliport.validation.evaluation.evaluation import (
    Answers,
    Evaluation,
    eager_answers,
    make_evaluation,
)
from caliport.validation.evaluation.probes import Probes, make_probes
from caliport.validation.gates.lowering import few_of
from caliport.validation.gates.rounding import Expected, expected_of
from caliport.validation.gates.weights import Source
from caliport.validation.runners import engine
from tests.conftest import TEXTS, random_adapter

Tensors = dict[str, Tensor]
RANK = 5  # of which the last is the calibration's
CONTEXT = 96


def build_base(out: Path, seed: int = 0, vocabulary: int = 384) -> Path:
    """A Hugging Face directory: a two-layer Llama with random weights and its tokenizer."""
    from caliport.calibrate.training.small_base import BaseShape, build_model, build_tokenizer

    shape = BaseShape(vocabulary, 64, 192, 2, 4, 2, CONTEXT)
    tokenizer = build_tokenizer(TEXTS, shape.vocab_size)
    model = build_model(tokenizer, shape, seed)
    with torch.no_grad():  # larger than the usual start, so that logits differ visibly
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def edit_tensors(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the tensors of a base or of an adapter in place."""
    (path,) = directory.glob("*.safetensors")
    save_file(
        {name: value.contiguous() for name, value in change(load_file(path)).items()},
        path,
        {"format": "pt"},
    )


def edit_json(path: Path, **changes: object) -> None:
    """Change fields of a JSON file in place."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@dataclass(frozen=True)
class Scene:
    """What was asked for, and what it should say; references are made once and kept.

    Attributes:
        base: A Hugging Face directory.
        adapter: A PEFT directory.
        inputs: What users say; None for the built-in prompts.
    """

    base: Path
    adapter: Path
    inputs: list[str] | None = None

    @classmethod
    def build(cls, root: Path, seed: int = 0) -> Scene:
        """Random weights, adapter and, but for seed 0, prompts."""
        base = build_base(root / "base", seed)
        adapter = random_adapter(base, root / "adapter", seed=seed + 1, rank=RANK)
        if seed == 0:
            return cls(base, adapter)
        draw, words = random.Random(seed), " ".join(TEXTS).split()
        inputs = [" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(16)]
        return cls(base, adapter, inputs)

    @property
    def source(self) -> Source:
        return Source(self.base, self.adapter)

    @cached_property
    def _fp32(self) -> PreTrainedModel:
        return eager(self.base, self.adapter, "fp32")

    @cached_property
    def evaluation(self) -> Evaluation:
        tokenizer = load_tokenizer(self.base)
        return make_evaluation(self._fp32, tokenizer, self.inputs, max_new_tokens=8, positions=8)

    @cached_property
    def few(self) -> Evaluation:
        return few_of(self.evaluation)

    @cached_property
    def probes(self) -> Probes:
        return make_probes(self._fp32.config.vocab_size, CONTEXT)

    @cached_property
    def fp32(self) -> Answers:
        return eager_answers(self._fp32, "fp32", self.evaluation)

    @cached_property
    def alone(self) -> Answers:
        """What the base says without the adapter."""
        return eager_answers(eager(self.base, None, "fp32"), "base", self.evaluation, write=False)

    @cached_property
    def _kept(self) -> dict[tuple[str, str], tuple[Expected, Expected | None]]:
        return {}

    def expected(self, artifact: Artifact) -> tuple[Expected, Expected | None]:
        """The answers that the artifact should give, rounding activations and not."""
        key = runtime, precision = artifact.runtime, artifact.precision
        if key not in self._kept:
            model = reference(self.base, self.adapter, precision, runtime)
            answers = eager_answers(model, precision, self.evaluation)
            said = expected_of(model, answers, self.evaluation, self.probes)
            graph = None
            if engine.get(runtime).runs_in_float and precision != "fp32":
                plain, few = dequantize(eager(self.base, self.adapter, precision)), self.few
                answers = eager_answers(plain, "float", few, write=False)
                graph = expected_of(plain, answers, few, self.probes)
            self._kept[key] = said, graph
        return self._kept[key]
