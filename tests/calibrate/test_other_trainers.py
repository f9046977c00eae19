"""Adapters as other trainers name and write them: the same ΔW."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from caliport.calibrate import LowRankUpdate, read_peft
from caliport.calibrate.bases import check_same_base, note_base
from caliport.calibrate.peft_files import read_adapter, read_update
from caliport.core.checkpoints import load_base
from caliport.core.errors import InputError
from caliport.export.decoder.fold import fold

P = "base_model.model."


@pytest.mark.parametrize(
    "name",
    [
        lambda key: key.removeprefix(P),
        lambda key: P + key,
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace(".weight", ".my-adapter.weight"),
        lambda key: key.replace(".mlp.", ".mlp._checkpoint_wrapped_module."),
        lambda key: key.replace("model.layers", "_fsdp_wrapped_module.model.layers"),
        lambda key: key.replace("model.layers", "model.language_model.layers"),
        lambda key: key.replace("model.layers", "language_model.model.layers"),
        lambda key: key.replace(f"{P}model.", P),
    ],
)
def test_names(
    name: Callable[[str], str], base_dir: Path, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    out = shutil.copytree(adapter_dirs[0], tmp_path / "a")
    file = out / "adapter_model.safetensors"
    tensors = load_file(file)
    renamed = {name(key): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file)
    model = load_base(base_dir)
    found, wanted = read_update(out, model), read_peft(adapter_dirs[0])
    assert found.modules == wanted.modules
    for module in wanted.modules:
        assert torch.equal(found.delta(module), wanted.delta(module))


@pytest.mark.parametrize("dora", [False, True])
def test_torchtune(dora: bool, base_dir: Path, tmp_path: Path) -> None:
    """PEFT's names beside only four settings; DoRA's magnitudes without the setting that says so.

    As ``tune_to_peft_adapter_weights`` and ``tune_to_peft_adapter_config`` of torchtune write.
    """
    draw = torch.Generator().manual_seed(0)
    shapes = {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 160)}
    tensors = {}
    for module, (rows, width) in shapes.items():
        name = f"{P}model.layers.0.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(4, width, generator=draw)
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=draw)
        if dora:
            tensors[f"{name}.lora_magnitude_vector"] = torch.rand(rows, generator=draw)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        **{"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.2-1B-Instruct"},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    if dora:
        with pytest.raises(InputError, match=r"has a lora_magnitude_vector.* use_dora = False"):
            read_update(tmp_path, load_base(base_dir))
        return
    found = read_update(tmp_path, load_base(base_dir))
    assert set(found.modules) == {f"model.layers.0.{module}" for module in shapes}
    for name in found.modules:
        a, b = (tensors[f"{P}{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(found.delta(name), 2 * b @ a)


def test_two_names_of_one_module() -> None:
    model = nn.Module()
    model.lm_head = nn.Linear(2, 3)
    names = ("lm_head", "language_model.lm_head")
    a, b = torch.ones(1, 2), torch.ones(3, 1)
    update = LowRankUpdate(dict.fromkeys(names, a), dict.fromkeys(names, b))
    with pytest.raises(InputError, match="are both lm_head of the base"):
        update.fitted(model, "x")


def mlx(out: Path, kind: str = "lora", **changes: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter as mlx-lm saves it."""
    out.mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for layer, module, width, rows in (
        (0, "self_attn.q_proj", 64, 64),
        (1, "mlp.up_proj", 64, 160),
    ):
        name = f"model.layers.{layer}.{module}"
        tensors[f"{name}.lora_a"] = torch.randn(width, 4, generator=draw)
        tensors[f"{name}.lora_b"] = torch.randn(4, rows, generator=draw)
        if kind == "dora":
            tensors[f"{name}.m"] = torch.rand(rows, generator=draw)
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.q_proj"], **changes}
    config = {
        "fine_tune_type": kind,
        "lora_parameters": {k: v for k, v in parameters.items() if v != "left out"},
        "model": "mlx-community/base-4bit",
        "num_layers": 16,
    }
    save_file(tensors, out / "adapters.safetensors")
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out, tensors


def test_mlx_is_its_formula(base_dir: Path, tmp_path: Path) -> None:
    """y = x·Wᵀ + scale·(x·a)·b"""
    adapter, tensors = mlx(tmp_path / "a")
    update = read_peft(adapter)
    assert update.modules == ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    model = load_base(base_dir)
    before = {n: model.get_submodule(n)(x) for n in update.modules}
    fold(model, update, adapter)
    for name in update.modules:
        wanted = before[name] + 20 * (x @ tensors[f"{name}.lora_a"]) @ tensors[f"{name}.lora_b"]
        torch.testing.assert_close(model.get_submodule(name)(x), wanted, rtol=1e-4, atol=1e-3)


def test_mlx_dora_is_its_formula(base_dir: Path, tmp_path: Path) -> None:
    """y = m/‖W + scale·(a·b)ᵀ‖ · (x·Wᵀ + scale·(x·a)·b)"""
    adapter, tensors = mlx(tmp_path / "a", "dora")
    model = load_base(base_dir)
    name = "model.layers.1.mlp.up_proj"
    a, b, m = (tensors[f"{name}.{part}"] for part in ("lora_a", "lora_b", "m"))
    weight = model.get_parameter(f"{name}.weight").detach().clone()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    norm = (weight + 20 * (a @ b).T).norm(dim=1)
    wanted = m / norm * (x @ weight.T + 20 * (x @ a) @ b)
    fold(model, read_adapter(adapter), adapter)
    torch.testing.assert_close(model.get_submodule(name)(x), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"fine_tune_type = 'dora'.*caliport export"):
        read_peft(adapter)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scale": "left out"}, "lora_parameters.scale is None, expected a number"),
        ({"rank": "left out"}, "lora_parameters.rank is None, expected an integer"),
        ({"rank": 8}, "has rank 4 and 4, adapter_config.json says 8"),
        ({"scale": 1e38}, "lora_parameters.scale is 1e.38, expected a number"),
        ({"alpha": 16}, "lora_parameters has alpha 16: versions of mlx-lm scale"),
        ({"future": 1}, "lora_parameters has 'future', which is not known"),
        ({"kind": "full"}, "fine_tune_type is 'full', expected one of lora, dora"),
    ],
    ids=str,
)
def test_mlx_settings(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    adapter, _ = mlx(tmp_path / "a", **changes)
    with pytest.raises(InputError, match=says):
        read_peft(adapter)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model.layers.0.x.lora_a": torch.ones(2, 4)}, "has not the parts of fine_tune_type lora"),
        ({"model.layers.0.x.weight": torch.ones(2, 4)}, "is not a LoRA matrix; refused"),
        ({"model.layers.0.x.lora_a": torch.ones(2, 4, 1)}, "expected a matrix"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mlx_tensors(change: dict[str, torch.Tensor], says: str, tmp_path: Path) -> None:
    adapter, tensors = mlx(tmp_path / "a")
    save_file({**tensors, **change}, adapter / "adapters.safetensors")
    with pytest.raises(InputError, match=says):
        read_peft(adapter)


def test_mlx_names_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, _ = mlx(tmp_path / "a")
    check_same_base([adapter, mlx(tmp_path / "b")[0]])
    note_base(adapter, "org/Base")
    assert "quantized weights of this base" in capsys.readouterr().err
