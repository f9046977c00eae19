"""LowRankUpdate against PEFT's own numbers, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from caliport.calibrate import LowRankUpdate, peft_settings, read_peft, write_peft
from caliport.calibrate.training.attach import attached
from caliport.core.checkpoints import load_base
from caliport.core.errors import InputError
from caliport.export.decoder.fold import fold


def peft_delta(base: Path, adapter: Path, name: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter)
    return model.base_model.model.get_submodule(name).get_delta_weight("default")


def logits(model: nn.Module, tokens: list[int]) -> torch.Tensor:
    """In float64: rounding grows by a factor of some hundred on the way through the tiny base."""
    with torch.no_grad():
        return model.eval().double()(torch.tensor([tokens])).logits


def assert_equal(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    """To 1e-5 of the largest value."""
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"use_rslora": True},
        {"use_rslora": True, "rank_pattern": {"k_proj": 9}, "alpha_pattern": {"k_proj": 5}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        {"rank_pattern": {r"layers\.\d+\.mlp\.(up|down)_proj": 7}},
        {"rank_pattern": {r"^model\.layers\.0\..*": 3}, "alpha_pattern": {"mlp.*": 1}},
        {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 5},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"exclude_modules": ["down_proj"]},
        {"lora_dropout": 0.3},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"velora_config": VeloraConfig(num_groups=2)},
        {"monteclora_config": MontecloraConfig(num_samples=2)},
        {"ensure_weight_tying": True},
    ],
    ids=lambda kind: "+".join(kind) or "plain",
)
def test_delta_and_logits_equal_peft(
    kind: dict, base_dir: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    adapter = random_adapter(base_dir, tmp_path / "a", seed=3, **kind)
    weights = adapter / "adapter_model.safetensors"
    # Some starts have A or B = 0.
    draw = torch.Generator().manual_seed(5)
    save_file(
        {
            key: 0.1 * torch.randn(t.shape, generator=draw) if ".lora_A." in key else t
            for key, t in load_file(weights).items()
        },
        weights,
    )
    update = read_peft(adapter)
    peft = PeftModel.from_pretrained(load_base(base_dir), adapter)
    assert set(update.modules) == {
        n.removesuffix(".lora_A")
        for n, _ in peft.base_model.model.named_modules()
        if n.endswith("lora_A")
    }
    for name in update.modules:
        wanted = peft.base_model.model.get_submodule(name).get_delta_weight("default")
        assert_equal(update.delta(name), wanted)
    wanted = logits(peft, prompts[1])
    model = load_base(base_dir)
    plain = logits(model, prompts[1])
    with attached(
        model, update.modules, lambda n: [(None, update.a[n].double(), update.b[n].double())]
    ):
        assert_equal(logits(model, prompts[1]), wanted)
    assert_equal(logits(fold(model, update, adapter), prompts[1]), wanted)
    assert (plain - wanted).abs().max() > 0.1


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=1
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize("stated", [True, False], ids=["stated", "left-to-peft"])
def test_fan_in_fan_out_is_exact(
    stated: bool, gpt2: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    """GPT-2's Conv1D stores its weight as [in, out]; PEFT sets the flag itself where it is not."""
    adapter = random_adapter(
        gpt2,
        tmp_path / "a",
        seed=3,
        target_modules=["c_attn", "c_fc", "attn.c_proj"],
        fan_in_fan_out=stated,
    )
    update = read_peft(adapter)
    assert update.shape("transformer.h.0.attn.c_attn") == (48, 16)
    peft = PeftModel.from_pretrained(load_base(gpt2), adapter)
    for name in update.modules:
        wanted = peft.base_model.model.get_submodule(name).get_delta_weight("default")
        assert_equal(update.delta(name).T, wanted)
    wanted = logits(peft, prompts[1])
    model = load_base(gpt2)
    assert isinstance(model.get_submodule(update.modules[0]), Conv1D)
    with attached(
        model, update.modules, lambda n: [(None, update.a[n].double(), update.b[n].double())]
    ):
        assert_equal(logits(model, prompts[1]), wanted)
    folded, merged = fold(model, update, adapter), peft.merge_and_unload()
    assert_equal(logits(folded, prompts[1]), wanted)
    for name in update.modules:
        assert_equal(folded.get_submodule(name).weight, merged.get_submodule(name).weight)
    write_peft(update, tmp_path / "again", base=str(gpt2))
    again = PeftModel.from_pretrained(load_base(gpt2), tmp_path / "again")
    assert_equal(logits(again, prompts[1]), wanted)


def test_conv1d_of_another_shape(gpt2: Path) -> None:
    a, b = torch.ones(1, 48), torch.ones(16, 1)
    update = LowRankUpdate({"transformer.h.0.attn.c_attn": a}, {"transformer.h.0.attn.c_attn": b})
    with pytest.raises(InputError, match=r"updates a \[16, 48\] weight, the base has \[48, 16\]"):
        fold(load_base(gpt2), update, "adapter")


def test_folding_into_a_tied_head_leaves_the_embedding(
    base_dir: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    model = load_base(base_dir)
    embedding = model.get_input_embeddings().weight.clone()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    peft = get_peft_model(
        load_base(base_dir),
        LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False),
    )
    peft.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    folded = fold(model, read_peft(tmp_path / "a"), "adapter")
    wanted = logits(peft, prompts[1])
    assert_equal(logits(folded, prompts[1]), wanted)
    assert torch.equal(folded.get_input_embeddings().weight, embedding)
    assert not folded.config.tie_word_embeddings
    folded.save_pretrained(tmp_path / "folded")
    assert_equal(logits(load_base(tmp_path / "folded"), prompts[1]), wanted)
    folded.tie_weights()
    assert_equal(logits(folded, prompts[1]), wanted)


def test_folding_elsewhere_leaves_the_head_tied(base_dir: Path, adapter_dirs: list[Path]) -> None:
    model = fold(load_base(base_dir), read_peft(adapter_dirs[0]), "adapter")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


def test_rank_0_is_saved_as_zeros(base_dir: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    write_peft(LowRankUpdate({name: torch.ones(0, 64)}, {name: torch.ones(160, 0)}), tmp_path)
    with pytest.raises(InputError, match="changes nothing"):
        read_peft(tmp_path)
    again = read_peft(tmp_path, zero=True)
    assert torch.equal(again.delta(name), torch.zeros(160, 64))
    assert not peft_delta(base_dir, tmp_path, name).any()


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=14, max_size=14), st.integers(0, 2**31))
def test_save_and_load_round_trips(
    base_dir: Path, tmp_path_factory: pytest.TempPathFactory, ranks: list[int], seed: int
) -> None:
    """Whatever the ranks, what is written is read back, by us and by PEFT."""
    linears = {n: m for n, m in load_base(base_dir).named_modules() if ".layers." in n}
    linears = {n: m for n, m in linears.items() if isinstance(m, torch.nn.Linear)}
    draw = torch.Generator().manual_seed(seed)
    a, b = {}, {}
    for (name, module), rank in zip(linears.items(), ranks, strict=True):
        a[name] = torch.randn(rank, module.in_features, generator=draw)
        b[name] = torch.randn(module.out_features, rank, generator=draw)
    out = tmp_path_factory.mktemp("saved")
    write_peft(LowRankUpdate(a, b), out, base=str(base_dir))
    again = read_peft(out)
    assert {n: again.rank(n) for n in again.modules} == dict(zip(linears, ranks, strict=True))
    for name in linears:
        torch.testing.assert_close(again.delta(name), b[name] @ a[name])
    name = min(linears)
    torch.testing.assert_close(
        peft_delta(base_dir, out, name), b[name] @ a[name], rtol=1e-5, atol=1e-5
    )


def broken(adapter: Path, tmp_path: Path, kind: str) -> Path:
    out = tmp_path / kind
    shutil.copytree(adapter, out)
    weights, config = out / "adapter_model.safetensors", out / "adapter_config.json"
    content = json.loads(config.read_text())
    tensors = load_file(weights)
    first = min(tensors)
    match kind:
        case "no-config":
            config.unlink()
        case "config-not-json":
            config.write_text("{")
        case "no-weights":
            weights.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "empty":
            weights.write_bytes(b"")
        case "pickled":
            weights.unlink()
            (out / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
        case "pickle-inside":
            weights.write_bytes(pickle.dumps({"a": 1}))
        case "zip-inside":
            torch.save({"a": torch.ones(1)}, weights)
        case "not-finite":
            tensors[first][0, 0] = float("nan")
            save_file(tensors, weights)
        case "half-a-pair":
            del tensors[first]
            save_file(tensors, weights)
        case "other-tensor":
            tensors["base_model.model.lm_head.weight"] = torch.ones(2, 2)
            save_file(tensors, weights)
        case "wrong-rank":
            content["r"] = 3
        case "no-alpha":
            del content["lora_alpha"]
        case "dora":
            content["use_dora"] = True
        case "bias":
            content["bias"] = "all"
        case "modules-to-save":
            content["modules_to_save"] = ["lm_head"]
        case "unknown":
            content["use_future_lora"] = True
        case "unknown-start":
            content["init_lora_weights"] = "tomorrow"
        case "pattern":
            content["rank_pattern"] = {"q_proj": "four"}
        case "infinite":
            content["lora_alpha"] = float("inf")
        case "convolution":
            tensors[first] = tensors[first][:, :, None, None]
            save_file(tensors, weights)
        case "pissa":
            content["init_lora_weights"] = "pissa_niter_4"
        case "ia3":
            content["peft_type"] = "IA3"
    if config.exists() and kind != "config-not-json":
        config.write_text(json.dumps(content))
    return out


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("no-config", "no adapter_config.json"),
        ("config-not-json", "not JSON"),
        ("no-weights", "no such file"),
        ("truncated", "truncated"),
        ("empty", "truncated"),
        ("pickled", "pickles are not read"),
        ("pickle-inside", "pickle"),
        ("zip-inside", "pickle"),
        ("not-finite", "not finite"),
        ("half-a-pair", "only one of"),
        ("other-tensor", "saved along with the adapter"),
        ("wrong-rank", "says 3"),
        ("no-alpha", "lora_alpha is None"),
        ("dora", "use_dora"),
        ("bias", "bias = 'all'"),
        ("modules-to-save", "modules_to_save"),
        ("unknown", "use_future_lora = True is not known here"),
        ("unknown-start", "'tomorrow' is not known here"),
        ("pattern", "rank_pattern.q_proj is 'four', expected an integer from 1"),
        ("infinite", "Infinity is not JSON"),
        ("convolution", "only LoRA on linear layers"),
        ("pissa", "changes the base"),
        ("ia3", "expected LORA"),
    ],
)
def test_bad_adapters_are_one_line(
    kind: str, says: str, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says) as caught:
        read_peft(broken(adapter_dirs[0], tmp_path, kind))
    assert "\n" not in str(caught.value)
    assert kind in str(caught.value), "the message names the directory"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ({"use_dora": True}, "use_dora = True: DoRA rescales each row"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias = True: it adds a bias"),
        ({"bias": "lora_only"}, "bias = 'lora_only': the base's biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save = .*: it replaces whole layers"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices = .*rows of the embedding"),
        (
            {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
            "target_parameters = .*: it updates bare parameters",
        ),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication = .*layers are repeated"),
        ({"kasa_config": KasaConfig()}, "kasa_config = .*smallest singular values"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens = .*aLoRA adds"),
        ({"target_modules": ["embed_tokens"]}, "lora_embedding_A: LoRA on an embedding"),
        ({"target_modules": ["lm_head"]}, "lm_head.weight: a layer of the base"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_is_no_low_rank_update_is_refused_with_the_reason(
    kind: dict, says: str, base_dir: Path, tmp_path: Path
) -> None:
    """Adapters that PEFT itself has written."""
    adapter = random_adapter(base_dir, tmp_path / "a", seed=0, **kind)
    with pytest.raises(InputError, match=says) as caught:
        read_peft(adapter)
    assert "\n" not in str(caught.value)
    assert str(adapter) in str(caught.value)


@pytest.mark.parametrize("field", sorted(peft_settings.REFUSED))
def test_every_refused_field_has_a_reason(
    field: str, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    out = shutil.copytree(adapter_dirs[0], tmp_path / "a")
    config = out / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: {"any": 1}}))
    with pytest.raises(InputError) as caught:
        read_peft(out)
    assert str(caught.value) == f"{config}: {field} = {{'any': 1}}: {peft_settings.REFUSED[field]}"


def test_every_setting_of_this_peft_is_known() -> None:
    """Fails when a PEFT has new settings: read what they do, then sort them in."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    known = [set(peft_settings.REFUSED), set(peft_settings.READ), set(peft_settings.HARMLESS)]
    assert fields == set.union(*known)
    assert sum(map(len, known)) == len(fields), "a setting has one place"


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        read_peft(tmp_path / "gone")


def test_adapter_of_another_base(base_dir: Path, adapter_dirs: list[Path]) -> None:
    update = read_peft(adapter_dirs[0])
    model = load_base(base_dir)
    renamed = LowRankUpdate(
        {n.replace("q_proj", "query"): t for n, t in update.a.items()},
        {n.replace("q_proj", "query"): t for n, t in update.b.items()},
    )
    with pytest.raises(InputError, match=r"query is not a linear layer of the base"):
        fold(model, renamed, "adapter")
    wider = LowRankUpdate({n: torch.cat([t, t], dim=1) for n, t in update.a.items()}, update.b)
    with pytest.raises(InputError, match="made for another base"):
        fold(model, wider, "adapter")
