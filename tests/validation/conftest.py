"""A composition of the tiny base, its rounded twin and an evaluation, built once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from calibrate.low_rank import LowRankUpdate
from caliport_core.checkpoints import load_base, load_tokenizer
from export.fold import fold
from validation.evaluation import Answers, Evaluation, eager_answers, make_evaluation

INPUTS = [
    "Anna and Tom meet in the park.",
    "Anna y Tom quedan el viernes.",
    "tennis on Friday",
    "grüße",
]


@dataclass(frozen=True)
class Scene:
    """Base, composition in float32, the same rounded to bfloat16, and their answers."""

    base: PreTrainedModel
    composed: PreTrainedModel
    rounded: PreTrainedModel
    evaluation: Evaluation
    base_answers: Answers
    fp32: Answers
    quantized: Answers


@pytest.fixture(scope="session")
def scene(base_dir: Path, adapter_dirs: list[Path]) -> Scene:
    base = load_base(base_dir)
    tokenizer = load_tokenizer(base_dir, base)
    adapter = adapter_dirs[0]
    composed = fold(load_base(base_dir), LowRankUpdate.from_peft(adapter), adapter)
    rounded = fold(load_base(base_dir), LowRankUpdate.from_peft(adapter), adapter)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16().float())
    evaluation = make_evaluation(composed, tokenizer, INPUTS, max_new_tokens=5, positions=6)
    return Scene(
        base,
        composed,
        rounded,
        evaluation,
        eager_answers(base, "base", evaluation, write=False),
        eager_answers(composed, "fp32", evaluation),
        eager_answers(rounded, "rounded", evaluation),
    )
