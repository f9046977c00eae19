"""LowRankUpdate against PEFT's own numbers, and every refusal."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calibrate import LowRankUpdate
from calibrate.correction import attached
from caliport_core.checkpoints import load_base
from caliport_core.errors import InputError
from export.fold import fold


def peft_logits(base: Path, adapter: Path, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits


def peft_delta(base: Path, adapter: Path, name: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter)
    return model.base_model.model.get_submodule(name).get_delta_weight("default")


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 5},
    ],
    ids=["plain", "rslora", "patterns", "some-modules"],
)
def test_delta_and_logits_equal_peft(
    kind: dict, base_dir: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    adapter = random_adapter(base_dir, tmp_path / "a", seed=3, **kind)
    update = LowRankUpdate.from_peft(adapter)
    for name in update.modules:
        torch.testing.assert_close(
            update.delta(name), peft_delta(base_dir, adapter, name), rtol=1e-5, atol=1e-6
        )
    wanted = peft_logits(base_dir, adapter, prompts[1])
    model = load_base(base_dir)
    with torch.no_grad(), attached(model, update.modules, lambda n: (update.a[n], update.b[n])):
        beside = model(torch.tensor([prompts[1]])).logits
        plain = load_base(base_dir)(torch.tensor([prompts[1]])).logits
        folded = fold(load_base(base_dir), update, adapter)(torch.tensor([prompts[1]])).logits
    torch.testing.assert_close(beside, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded, wanted, rtol=1e-4, atol=1e-4)
    assert (plain - wanted).abs().max() > 0.1


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
    LowRankUpdate(a, b).to_peft(out, base=str(base_dir))
    again = LowRankUpdate.from_peft(out)
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
        case "fan-in-fan-out":
            content["fan_in_fan_out"] = True
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
        ("other-tensor", "refused, not dropped"),
        ("wrong-rank", "says 3"),
        ("no-alpha", "lora_alpha is None"),
        ("dora", "use_dora"),
        ("bias", "bias = 'all'"),
        ("modules-to-save", "modules_to_save"),
        ("fan-in-fan-out", "fan_in_fan_out"),
        ("pissa", "changes the base"),
        ("ia3", "expected LORA"),
    ],
)
def test_bad_adapters_are_one_line(
    kind: str, says: str, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says) as caught:
        LowRankUpdate.from_peft(broken(adapter_dirs[0], tmp_path, kind))
    assert "\n" not in str(caught.value)
    assert kind in str(caught.value), "the message names the directory"


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        LowRankUpdate.from_peft(tmp_path / "gone")


def test_adapter_of_another_base(base_dir: Path, adapter_dirs: list[Path]) -> None:
    update = LowRankUpdate.from_peft(adapter_dirs[0])
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
