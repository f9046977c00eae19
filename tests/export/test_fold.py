"""Folds of adapters that are more than a low-rank update, against PEFT's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_adapter, randomized
from exports import to_onnx
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from caliport.calibrate import read_peft
from caliport.calibrate.peft_files import read_adapter, read_update
from caliport.core.checkpoints import load_base
from caliport.core.directories import MANIFEST
from caliport.core.errors import InputError
from caliport.export.decoder.fold import fold
from caliport.export.decoder.shipped import shipped_decoder
from caliport.export.decoder.terms import read_updates


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen 2, whose q, k and v have biases, with a head of its own."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    out = tmp_path_factory.mktemp("qwen")
    model.save_pretrained(out)
    return out


def forward(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().double()(torch.tensor([tokens])).logits


MIXED: list[dict[str, Any]] = [
    {"use_dora": True},
    {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens", "norm"], "target_modules": ["q_proj", "up_proj"]},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": ["lm_head", "q_proj"], "use_dora": True},
    {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    {"bias": "all", "target_modules": ["q_proj", "up_proj"]},
    {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
    {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
]


@pytest.mark.parametrize("kind", MIXED, ids=lambda kind: "+".join(f"{k}" for k in kind))
def test_a_fold_equals_peft(kind: dict[str, Any], biased: Path, tmp_path: Path) -> None:
    adapter = randomized(random_adapter(biased, tmp_path / "a", seed=1, **kind))
    peft = PeftModel.from_pretrained(load_base(biased), adapter)
    wanted = forward(peft, [3, 5, 8, 13])
    folded = fold(load_base(biased), read_adapter(adapter), adapter)
    found = forward(folded, [3, 5, 8, 13])
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (forward(load_base(biased), [3, 5, 8, 13]) - wanted).abs().max() > 1e-2
    merged = peft.float().merge_and_unload()
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(folded.float().get_parameter(name), parameter)


@pytest.mark.parametrize(
    "kind",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
        {"use_dora": True},
        {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=str,
)
def test_what_ships_is_what_is_folded(
    kind: dict[str, Any], base_dir: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    """Also where head and embedding are tied in the base and only one of them is changed."""
    adapter = randomized(random_adapter(base_dir, tmp_path / "a", seed=1, **kind))
    wanted = forward(PeftModel.from_pretrained(load_base(base_dir), adapter), prompts[1])
    folded = fold(load_base(base_dir), read_adapter(adapter), adapter)
    parameters = dict(folded.named_parameters(remove_duplicate=False))
    with shipped_decoder(base_dir, adapter, "fp32", tmp_path) as decoder:
        names = {name for name, _ in decoder.whole.named_parameters(remove_duplicate=False)}
        stored = {name: decoder.weights[name].tensor().clone() for name in names}
    assert stored.keys() == parameters.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor, parameters[name]), name
    found = forward(folded, prompts[1])
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_dora_on_a_transposed_weight(tmp_path: Path) -> None:
    """GPT-2's Conv1D."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_embd=16, n_layer=1, n_head=2, eos_token_id=0, bos_token_id=0)
    )
    model.save_pretrained(tmp_path / "base")
    adapter = randomized(
        random_adapter(
            tmp_path / "base", tmp_path / "a", seed=1, target_modules=["c_attn"], use_dora=True
        )
    )
    peft = PeftModel.from_pretrained(load_base(tmp_path / "base"), adapter)
    folded = fold(load_base(tmp_path / "base"), read_adapter(adapter), adapter)
    wanted = forward(peft, [3, 5, 8])
    assert (forward(folded, [3, 5, 8]) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ({"use_dora": True}, "use_dora = True.*fold it into the base with caliport export"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .*with caliport export"),
        ({"target_modules": ["embed_tokens"]}, "LoRA on an embedding.*with caliport export"),
        ({"bias": "all"}, "bias = 'all'.*with caliport export"),
    ],
    ids=str,
)
def test_where_a_low_rank_form_is_needed(
    kind: dict[str, Any], says: str, base_dir: Path, tmp_path: Path
) -> None:
    adapter = randomized(random_adapter(base_dir, tmp_path / "a", seed=1, **kind))
    model = load_base(base_dir)
    for read in (
        lambda: read_peft(adapter),
        lambda: read_update(adapter, model),
        lambda: read_updates(base_dir, {"a": adapter}),
    ):
        with pytest.raises(InputError, match=says):
            read()


def head_adapter(base: Path, out: Path) -> Path:
    """PEFT saves the base's head along with a LoRA on it."""
    adapter = random_adapter(base, out, seed=1, target_modules=["lm_head", "q_proj"])
    assert any(".base_layer." in key for key in load_file(adapter / "adapter_model.safetensors"))
    return adapter


def test_a_saved_layer_of_the_base_is_compared(base_dir: Path, tmp_path: Path) -> None:
    adapter = head_adapter(base_dir, tmp_path / "a")
    model = load_base(base_dir)
    update = read_update(adapter, model)
    assert "lm_head" in update.modules
    assert read_updates(base_dir, {"a": adapter})["a"].modules == update.modules
    with pytest.raises(InputError, match="save_embedding_layers=False"):
        read_peft(adapter)
    file = adapter / "adapter_model.safetensors"
    half = {k: t.half() if ".base_layer." in k else t for k, t in load_file(file).items()}
    save_file(half, file)
    assert read_update(adapter, model).modules == update.modules
    save_file({k: t * 2 if ".base_layer." in k else t for k, t in half.items()}, file)
    for read in (
        lambda: read_update(adapter, model),
        lambda: fold(model, read_adapter(adapter), adapter),
        lambda: read_updates(base_dir, {"a": adapter}),
    ):
        with pytest.raises(InputError, match=r"lm_head.weight was saved along .* differs from the"):
            read()


@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head", "q_proj"]], ids=str)
def test_a_resized_vocabulary_gets_advice(
    targets: list[str], base_dir: Path, tmp_path: Path
) -> None:
    model = load_base(base_dir)
    model.resize_token_embeddings(400)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    peft.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    with pytest.raises(InputError, match=r"vocabulary was resized from 384 to 400 .* as the base"):
        read_update(tmp_path / "a", load_base(base_dir))


@pytest.mark.parametrize(
    ("kind", "drop", "says"),
    [
        ({"use_dora": True}, "layers.0.self_attn.q_proj.lora_magnitude_vector", "has no lora_magn"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight", "has nothing of 'lm_head'"),
        ({"bias": "all"}, "self_attn.v_proj.base_layer.bias", "v_proj.bias is not in the file"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_B.bias", "has no lora_B.bias"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_parts_that_are_missing(
    kind: dict[str, Any], drop: str, says: str, biased: Path, tmp_path: Path
) -> None:
    adapter = randomized(random_adapter(biased, tmp_path / "a", seed=1, **kind))
    file = adapter / "adapter_model.safetensors"
    kept = {key: t for key, t in load_file(file).items() if drop not in key}
    assert len(kept) < len(load_file(file))
    save_file(kept, file)
    with pytest.raises(InputError, match=says):
        fold(load_base(biased), read_adapter(adapter), adapter)


def test_an_artifact_of_what_a_fold_takes_validates(base_dir: Path, tmp_path: Path) -> None:
    """DoRA, a LoRA on the tied head and a trained norm, in int4: what ships is the reference's."""
    from caliport.validation.api import validate

    adapter = randomized(
        random_adapter(
            base_dir,
            tmp_path / "a",
            seed=1,
            target_modules=["lm_head", "q_proj", "up_proj"],
            modules_to_save=["norm"],
            use_dora=True,
        )
    )
    out = to_onnx(base_dir, tmp_path / "out", precision="int4", adapter=adapter)
    described = json.loads((out / MANIFEST).read_text())["adapter"]
    assert described["modules"] == ["lm_head", "q_proj", "up_proj"]
    result = validate(out, base_dir, adapter)
    assert result.passed, result
