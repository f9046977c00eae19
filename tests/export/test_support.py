"""What cannot be exported is refused in one line, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  registers torch.ops.llama
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from caliport.core.errors import InputError
from caliport.export.decoder.attention import attended, check_attended, check_attention, check_cache
from caliport.export.decoder.checks import check_exportable
from caliport.export.executorch.decoder import Decoder

_TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_WIDE = _TINY | {"intermediate_size": 32, "num_key_value_heads": 2, "pad_token_id": 0}


def _model(name: str, config: str, **settings: Any) -> PreTrainedModel:
    """A model on the meta device, which is all that the checks may need."""
    with torch.device("meta"):
        return getattr(transformers, name)(getattr(transformers, config)(**settings))


def _llama(**settings: Any) -> PreTrainedModel:
    return _model(
        "LlamaForCausalLM", "LlamaConfig", **_WIDE, max_position_embeddings=32, **settings
    )


def _longrope() -> PreTrainedModel:
    rope = {"rope_type": "longrope", "rope_theta": 1e4}
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    return _model(
        "Phi3ForCausalLM",
        "Phi3Config",
        **_WIDE,
        eos_token_id=1,
        max_position_embeddings=64,
        original_max_position_embeddings=8,
        rope_parameters=rope | factors,
    )


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "encoder-decoder": (
        lambda: _model("T5ForConditionalGeneration", "T5Config", vocab_size=64, d_model=32),
        "is_encoder_decoder is true, expected a decoder-only model",
    ),
    "vision": (
        lambda: _model(
            "Gemma3ForConditionalGeneration", "Gemma3Config", text_config=_WIDE | {"head_dim": 16}
        ),
        "model_type gemma3 has text_config, vision_config; expected a text-only decoder",
    ),
    "cross attention": (
        lambda: _llama(cross_attention_layers=[1]),
        "model_type llama has cross_attention_layers; expected a text-only decoder",
    ),
    "experts": (
        lambda: _model("MixtralForCausalLM", "MixtralConfig", **_WIDE, num_local_experts=3),
        "num_local_experts 3: a mixture of experts .* expected a dense model",
    ),
    "linear attention": (
        lambda: _llama(layer_types=["linear_attention", "full_attention"]),
        "layer_types has linear_attention, expected full_attention or sliding_attention",
    ),
    "mamba": (
        lambda: _model("MambaForCausalLM", "MambaConfig", **_TINY),
        "layer_types has linear_attention",
    ),
    "state": (
        lambda: _model("RwkvForCausalLM", "RwkvConfig", vocab_size=64, hidden_size=32),
        "model_type rwkv has layers that keep a state .* expected attention layers only",
    ),
    "short chunks": (
        lambda: _llama(layer_types=["chunked_attention"] * 2, attention_chunk_size=8),
        "context: found 16, expected at most config.json's attention_chunk_size of 8",
    ),
    "latent attention": (
        lambda: _model("MiniCPM3ForCausalLM", "MiniCPM3Config", **_WIDE),
        "kv_lora_rank is 256: layers with caches of other sizes .* expected none",
    ),
    "shared caches": (
        lambda: _llama(num_kv_shared_layers=1),
        "num_kv_shared_layers is 1: layers with caches of other sizes",
    ),
    "looking ahead": (
        lambda: _model(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **_WIDE,
            head_dim=16,
            use_bidirectional_attention=True,
        ),
        "attends to later tokens .use_bidirectional_attention.* expected causal attention",
    ),
    "encoder": (
        lambda: _model("BertLMHeadModel", "BertConfig", **_TINY),
        "model_type bert attends to later tokens .*is_decoder",
    ),
    "sinks": (
        lambda: _model("GraniteSWAForCausalLM", "GraniteSWAConfig", **_WIDE),
        "model_type granite_swa has attention sinks .*expected plain softmax attention",
    ),
    "no positions": (
        lambda: _model("BloomForCausalLM", "BloomConfig", vocab_size=64, hidden_size=32),
        "BloomForCausalLM: its forward takes no position_ids",
    ),
    "positions from padding": (
        lambda: _model("RobertaForCausalLM", "RobertaConfig", **_TINY, is_decoder=True),
        r"model_type roberta counts positions from pad_token_id \+ 1; expected positions from 0",
    ),
    "attention of its own": (
        lambda: _model(
            "GPTJForCausalLM", "GPTJConfig", vocab_size=64, n_embd=32, n_head=2, rotary_dim=8
        ),
        "GPTJForCausalLM: its attention is code of its own",
    ),
    "longrope": (
        _longrope,
        "context: found 16, expected at most config.json's original_max_position_embeddings of 8: "
        "beyond it, the rotary embeddings of rope_type longrope depend on the length of the text",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_exported_is_refused_before_any_work(kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(InputError, match=message) as caught:
        check_exportable(make(), 16)
    assert "\n" not in str(caught.value)


def test_what_fits_the_context_is_not_refused() -> None:
    check_exportable(_llama(layer_types=["chunked_attention"] * 2, attention_chunk_size=16), 16)
    check_exportable(_longrope(), 8)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    check_exportable(_llama(rope_parameters=dynamic), 32)
    with pytest.raises(InputError, match=r"found 33, .* max_position_embeddings of 32: .* dynamic"):
        check_exportable(_llama(rope_parameters=dynamic), 33)
    for context in (0, 33):
        with pytest.raises(InputError, match=f"context: found {context}, expected 1 to .* 32"):
            check_exportable(_llama(), context)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Doge", "model_type doge has an attention mask of its own"),
        ("DiffLlama", "changes keys or values after they are cached"),
    ],
)
def test_what_shows_only_while_tracing_is_refused_then(name: str, message: str) -> None:
    config = getattr(transformers, f"{name}Config")(**_WIDE, max_position_embeddings=32)
    decoder = Decoder(getattr(transformers, f"{name}ForCausalLM")(config).eval(), 16)
    with torch.no_grad(), pytest.raises(InputError, match=message):
        decoder(torch.tensor([[5, 6]]), torch.tensor([0]))


class _Layer:
    """A cache that gave two tensors."""

    def __init__(self) -> None:
        self.given = (torch.ones(1), torch.ones(1))
        self.attended = False


def test_every_cache_must_be_attended_to_as_it_is() -> None:
    layers = [_Layer(), _Layer()]
    assert attended(layers, *layers[1].given) == (1, layers[1])
    with pytest.raises(InputError, match="layer 0 does not attend to a cache of its own"):
        check_attended(layers)
    with pytest.raises(InputError, match="changes keys or values after they are cached"):
        attended(layers, layers[0].given[0] * 1, layers[0].given[1])
    attended(layers, *layers[0].given)
    check_attended(layers)


def test_other_attention_and_caches_are_refused() -> None:
    for options, message in (
        ({"s_aux": torch.ones(2)}, "attention with s_aux cannot be exported to onnx"),
        ({"position_bias": torch.ones(2)}, "attention with position_bias cannot"),
        ({"is_causal": False}, "attention with is_causal false cannot"),
    ):
        with pytest.raises(InputError, match=message):
            check_attention(options, "onnx")
    check_attention({"dropout": 0.0, "sliding_window": 4, "position_ids": torch.ones(2)}, "onnx")
    states = torch.ones(1, 2, 3, 8)
    with pytest.raises(InputError, match=r"layer 1 has 2 key-value heads of 8, .* 2 of 16"):
        check_cache(1, (states, states), 2, 16)
