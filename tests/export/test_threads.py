"""Exports in several threads of a process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from caliport.core.checkpoints import load_tokenizer
from tests.exports import exported
from tests.lowerings import lowered_anew


@pytest.fixture
def small_dir(base_dir: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=16,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    load_tokenizer(base_dir).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _programs(artifact: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(artifact.glob("model.*"))}


@pytest.mark.slow
def test_three_exports_at_once_are_those_of_one_after_another(
    small_dir: Path, tmp_path: Path
) -> None:
    def export(runtime: str, name: str) -> dict[str, bytes]:
        return _programs(exported(runtime, small_dir, tmp_path / name, precision="int4"))

    runtimes = ["onnx", "executorch", "onnx"]
    with lowered_anew(), ThreadPoolExecutor(len(runtimes)) as pool:
        found = list(pool.map(export, runtimes, ["first", "second", "third"]))
    with lowered_anew():
        expected = {runtime: export(runtime, runtime) for runtime in set(runtimes)}
    assert all(expected.values())
    assert found == [expected[runtime] for runtime in runtimes]
