"""Each patch of transformers: that it is still needed, still fits, and refuses other releases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

from caliport.core.patching import is_tested
from caliport.export.decoder import patches
from caliport.export.decoder.patches import own_attention, short_rotary
from tests.exports import exported

PATCHES = [own_attention, short_rotary]


def test_every_patch_was_tested_with_what_is_installed() -> None:
    files = {path.stem for path in Path(patches.__file__).parent.glob("*.py")}
    assert files - {"__init__"} == {module.__name__.split(".")[-1] for module in PATCHES}
    for module in PATCHES:
        assert is_tested(module.RELEASES), module.__name__
        assert "\nUpstream: " in (module.__doc__ or "")


def _model(**settings: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        **settings,
    )
    return LlamaForCausalLM(config).eval()


def _registered() -> set[str]:
    return {*AttentionInterface._global_mapping, *AttentionMaskInterface._global_mapping}


def test_a_model_attends_through_a_function_of_ours_and_nothing_stays_registered() -> None:
    model, before = _model(), _registered()
    asked: list[str] = []

    def attention(_module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        asked.append(mask)
        return query.transpose(1, 2), None

    own = model.config._attn_implementation
    with torch.no_grad(), own_attention.own_attention(model, attention, lambda **options: "mask"):
        model(torch.tensor([[1, 2]]), use_cache=False)
    assert asked == ["mask"]
    assert _registered() == before
    assert model.config._attn_implementation == own


def test_rotary_embeddings_still_look_at_the_length_of_a_text() -> None:
    model = _model(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    rotary: Any = model.model.rotary_emb
    short = rotary.inv_freq.clone()
    long = torch.arange(32)[None]
    with short_rotary.short_rotary(model):
        rotary(torch.zeros(1, 32, 32), long)
        torch.testing.assert_close(rotary.inv_freq, short, rtol=0, atol=0)
    rotary(torch.zeros(1, 32, 32), long)
    assert not torch.equal(rotary.inv_freq, short)
    assert rotary.rope_type == "dynamic"


def test_another_transformers_is_refused(refused: Callable[..., None]) -> None:
    model = _model(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0})
    refused(lambda: short_rotary.short_rotary(model), transformers="5.24.0")
    refused(lambda: own_attention.own_attention(model, print, print), transformers="5.24.0")
    with short_rotary.short_rotary(_model()):
        pass  # its rotary embeddings do not depend on the length


@pytest.mark.parametrize("runtime", ["executorch", "onnx"])
def test_an_export_with_another_transformers_ends_in_one_line(
    runtime: str, base_dir: Path, tmp_path: Path, refused: Callable[..., None]
) -> None:
    refused(lambda: exported(runtime, base_dir, tmp_path / "out"), transformers="5.24.0")
    assert not list(tmp_path.iterdir())
