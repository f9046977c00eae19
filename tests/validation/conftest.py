"""A composition of the tiny base, its rounded twin and an evaluation, built once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from caliport.calibrate.peft_files import read_peft
from caliport.core.checkpoints import load_base, load_tokenizer
from caliport.export.decoder.fold import fold
from caliport.validation.evaluation.evaluation import (
    Answers,
    Evaluation,
    eager_answers,
    make_evaluation,
)
from caliport.validation.evaluation.probes import make_probes
from caliport.validation.gates.rounding import Expected, expected_of

INPUTS = [
    "Anna and Tom meet in the park.",
    "Anna y Tom quedan el viernes.",
    "tennis on Friday",
    "grüße",
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are many times slower when two threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Scene:
    """Base, composition in float32, the same rounded to bfloat16, and their answers."""

    base: PreTrainedModel
    composed: PreTrainedModel
    rounded: PreTrainedModel
    evaluation: Evaluation
    base_answers: Answers
    fp32: Answers
    exact: Expected
    quantized: Expected


@pytest.fixture(scope="session")
def scene(base_dir: Path, adapter_dirs: list[Path]) -> Scene:
    base = load_base(base_dir)
    tokenizer = load_tokenizer(base_dir, base)
    adapter = adapter_dirs[0]
    composed = fold(load_base(base_dir), read_peft(adapter), adapter)
    rounded = fold(load_base(base_dir), read_peft(adapter), adapter)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16().float())
    evaluation = make_evaluation(composed, tokenizer, INPUTS, max_new_tokens=5, positions=6)
    probes = make_probes(384, 128)
    fp32 = eager_answers(composed, "fp32", evaluation)
    quantized = eager_answers(rounded, "rounded", evaluation)
    return Scene(
        base,
        composed,
        rounded,
        evaluation,
        eager_answers(base, "base", evaluation, write=False),
        fp32,
        expected_of(composed, fp32, evaluation, probes),
        expected_of(rounded, quantized, evaluation, probes),
    )


@pytest.fixture(scope="session")
def onnx_dir(
    base_dir: Path, adapter_dirs: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The composition as a real ONNX artifact in int4."""
    from tests.exports import to_onnx

    out = tmp_path_factory.mktemp("artifacts") / "onnx-int4"
    return to_onnx(base_dir, out, adapter=adapter_dirs[0], precision="int4")
