"""DoRA as a low-rank update: the nearest one, how near it is, and PEFT's model at full rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_adapter, randomized
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel

import caliport
from caliport.calibrate import read_peft
from caliport.calibrate.dora import read_nearest
from caliport.calibrate.peft_files import read_adapter, read_update
from caliport.core.checkpoints import load_base
from caliport.core.directories import read_manifest
from caliport.core.errors import InputError
from caliport.export.decoder.fold import fold
from caliport.recipe.schema import Recipe
from caliport.run.compose import compose, prepare_all
from caliport.run.resolve import parse
from caliport.run.workspace import Workspace
from tests.calibrate.test_other_trainers import mlx
from tests.forking import forked


def dora(base: Path, out: Path, seed: int = 1, **settings: Any) -> Path:
    return randomized(random_adapter(base, out, seed, use_dora=True, **settings))


@pytest.fixture(scope="module")
def adapter(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dora(base_dir, tmp_path_factory.mktemp("dora") / "a")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("gpt2")
    ends = {"eos_token_id": 0, "bos_token_id": 0}
    config = GPT2Config(vocab_size=96, n_embd=16, n_layer=1, n_head=2, **ends)
    GPT2LMHeadModel(config).save_pretrained(out)
    return out


def logits(base: Path, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(load_base(base), adapter).eval().double()
    with torch.no_grad():
        return model(torch.tensor([[3, 5, 8, 13]])).logits


def changes(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """W' - W0 of each module, from PEFT's merge."""
    merged = PeftModel.from_pretrained(load_base(base), adapter).merge_and_unload()
    before = load_base(base)
    names = (f"{name}.weight" for name in read_adapter(adapter).update.modules)
    return {n: (merged.get_parameter(n) - before.get_parameter(n)).detach() for n in names}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_at_full_rank_it_is_pefts_model(
    kind: str, base_dir: Path, gpt2: Path, tmp_path: Path
) -> None:
    base = base_dir if kind == "llama" else gpt2
    target = {} if kind == "llama" else {"target_modules": ["c_attn"]}
    adapter = dora(base, tmp_path / "a", **target)
    out = caliport.compose(base, [adapter], tmp_path / "out", method="exact", dora="svd=65536")
    wanted = logits(base, adapter)
    assert (logits(base, out) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    (said,) = read_manifest(out)["dora"]
    assert said["worst"] < 1e-6


def test_it_is_the_nearest_of_its_rank(base_dir: Path, adapter: Path) -> None:
    """Twice the adapter's rank unless told; the error is that of the cut singular values."""
    model = load_base(base_dir)
    for rank, used in ((None, 8), (3, 3)):
        update, near = read_nearest(adapter, model, rank)
        assert near is not None
        assert near.rank == used
        errors = {}
        for name, change in changes(base_dir, adapter).items():
            module = name.removesuffix(".weight")
            assert update.rank(module) == used
            values = torch.linalg.svdvals(change)
            wanted = float(values[used:].norm() / values.norm())
            errors[module] = float((update.delta(module) - change).norm() / change.norm())
            assert errors[module] == pytest.approx(wanted, rel=1e-3)
        assert near.worst == pytest.approx(errors[near.module], rel=1e-3)
        assert near.worst == pytest.approx(max(errors.values()), rel=1e-3)
        assert near.mean == pytest.approx(sum(errors.values()) / len(errors), rel=1e-3)


def test_one_of_mlx(base_dir: Path, tmp_path: Path) -> None:
    adapter, _ = mlx(tmp_path / "a", "dora")
    folded = fold(load_base(base_dir), read_adapter(adapter), adapter)
    update, near = read_nearest(adapter, load_base(base_dir), 64)
    assert near is not None
    for name in update.modules:
        weight = load_base(base_dir).get_parameter(f"{name}.weight") + update.delta(name)
        torch.testing.assert_close(weight, folded.get_parameter(f"{name}.weight"))


def test_without_dora_nothing_changes(base_dir: Path, adapter_dirs: list[Path]) -> None:
    update, near = read_nearest(adapter_dirs[0], load_base(base_dir), 1)
    assert near is None
    assert update.rank(update.modules[0]) == 4


def test_the_command_and_what_it_says(
    base_dir: Path, adapter: Path, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    flags = ["calibrate", "--base", base_dir, "--adapter", adapter, "--adapter", adapter_dirs[0]]
    flags += ["--method", "exact", "--out", "out"]
    done = forked(*flags, cwd=tmp_path)
    assert done.returncode == 2
    assert "use_dora = True: DoRA rescales each row" in done.stderr
    assert "with caliport calibrate --dora svd" in done.stderr
    done = forked(*flags, "--dora", "svd", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a: DoRA as a low-rank update of rank 8: relative error " in done.stderr + done.stdout
    (said,) = read_manifest(tmp_path / "out")["dora"]
    assert (said["adapter"], said["rank"]) == ("a", 8)
    assert 0 < said["mean"] <= said["worst"] < 1
    assert read_peft(tmp_path / "out").rank("model.layers.0.mlp.up_proj") == 12
    again = forked(*flags, "--dora", "svd=5", cwd=tmp_path)
    assert "up to date" not in again.stderr
    assert read_peft(tmp_path / "out").rank("model.layers.0.mlp.up_proj") == 9


@pytest.mark.parametrize("how", ["svd=0", "svd=", "svd=99999", "svd=-1", "lora", "svd\n", "svd=٣"])
def test_what_is_no_way_for_dora(how: str, base_dir: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--dora: found .*, expected svd or svd=RANK with a rank"):
        caliport.compose(base_dir, [adapter], tmp_path / "out", method="exact", dora=how)
    with pytest.raises(ValueError, match="expected svd or svd=RANK"):
        Recipe.model_validate({**RECIPE, "calibration": {"dora": how}})


def test_what_more_than_dora_is_still_refused(base_dir: Path, tmp_path: Path) -> None:
    adapter = dora(base_dir, tmp_path / "a", modules_to_save=["lm_head"])
    with pytest.raises(InputError, match=r"modules_to_save = .*replaces whole layers"):
        read_nearest(adapter, load_base(base_dir))


RECIPE: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": "pocket", "train": 8, "validation": 4},
    "base": {"path": "base"},
    "adapters": {"summarize": "a", "translate_es": "b"},
    "compositions": {"summarize_es": ["summarize", "translate_es"]},
    "calibration": {"dora": "svd=6", "methods": ["exact"]},
}


def test_in_a_recipe(base_dir: Path, adapter_dirs: list[Path], tmp_path: Path) -> None:
    """All that a run does sees the low-rank form; an adapter without DoRA is used as it is."""
    adapters = {"summarize": dora(base_dir, tmp_path / "a"), "translate_es": adapter_dirs[1]}
    recipe = Recipe.model_validate(
        {**RECIPE, "base": {"path": str(base_dir)}} | {"adapters": adapters}
    )
    space = Workspace(recipe, tmp_path / "runs" / "tiny")
    prepare_all(space)
    compose(space, "summarize_es", parse("exact"))
    assert space.adapter("translate_es") == adapter_dirs[1]
    assert (tmp_path / "runs" / "tiny") in space.adapter("summarize").parents
    assert read_manifest(space.adapter("summarize"))["dora"][0]["rank"] == 6
    composed = read_update(space.composed("summarize_es", "exact"), load_base(base_dir))
    assert composed.rank("model.layers.0.mlp.up_proj") == 6 + 4
