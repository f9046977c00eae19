"""Bases and layers that once ended in a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from forking import forked

import caliport
from caliport.calibrate import LowRankUpdate, read_peft, write_peft
from caliport.calibrate.low_rank import linear_shapes
from caliport.calibrate.training.batches import Encoded
from caliport.calibrate.training.flix import FeatureSet, FeatureSettings, train_features
from caliport.calibrate.training.loop import TrainRun, TrainSettings
from caliport.calibrate.training.lora import LoraSettings, train_lora
from caliport.core.checkpoints import load_base, longest_context
from caliport.core.directories import read_manifest
from caliport.core.errors import Diverged, InputError
from caliport.recipe.methods import parse
from caliport.stages.compose import ComposeSettings, CompositionInputs, compose_to
from caliport.stages.sources import Source

RUN = TrainRun(TrainSettings(steps=1, batch_size=2), "x")
EXAMPLES = [Encoded((5, 6), (7, 2)), Encoded((5, 8), (9, 2))]


def _bloom() -> Any:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=384, hidden_size=32, n_layer=2, n_head=2)
    )


def _gemma3() -> Any:
    """The multimodal one: its text model's settings are one level down."""
    text = {
        **{"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
        **{"max_position_embeddings": 128, "sliding_window": 16},
    }
    vision = {
        **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    }
    ids = {"mm_tokens_per_image": 4, "image_token_index": 383, "boi_token_index": 381}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, eoi_token_index=382, **ids
    )
    return transformers.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize(("make", "context"), [(_bloom, 1 << 20), (_gemma3, 128)])
def test_corrections_train_on_other_bases(
    make: Any, context: int, base_dir: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make()
    model.generation_config.eos_token_id = 2
    base = tmp_path / "base"
    model.save_pretrained(base)
    for path in base_dir.iterdir():
        if "token" in path.name or path.name.endswith(".jinja"):
            shutil.copy(path, base)
    assert longest_context(model.config) == context
    shapes = linear_shapes(load_base(base))
    names = [n for n in shapes if n.endswith(("dense_h_to_4h", "q_proj")) and "vision" not in n]
    assert names
    for seed in range(2):
        draw = torch.Generator().manual_seed(seed)
        update = LowRankUpdate(
            {n: torch.randn(2, shapes[n][1], generator=draw) for n in names},
            {n: torch.randn(shapes[n][0], 2, generator=draw) for n in names},
        )
        write_peft(update, tmp_path / f"adapter{seed}", base=str(base))
    (tmp_path / "data.jsonl").write_text('{"input": "Anna", "output": "Tom"}\n' * 4)
    caliport.compose(
        base, [tmp_path / "adapter0", tmp_path / "adapter1"], tmp_path / "out", method="lc",
        data=tmp_path / "data.jsonl", training={"steps": 1, "batch_size": 2},
    )  # fmt: skip
    assert set(read_peft(tmp_path / "out").modules) == set(names)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (("nothing",), "no layer of the base has such a name; expected some of down_proj, gate"),
        ((), "no layer of the base has such a name"),
        (("embed_tokens",), "model.embed_tokens is not a linear layer"),
        (("self_attn", "q_proj"), "model.layers.0.self_attn is not a linear layer"),
    ],
)
def test_layers_that_cannot_be_trained_are_named(
    targets: tuple[str, ...], says: str, base_dir: Path
) -> None:
    model = load_base(base_dir)
    with pytest.raises(InputError, match=says) as caught:
        train_lora(model, EXAMPLES, LoraSettings(target_modules=targets), RUN)
    assert "\n" not in str(caught.value)
    sets = [FeatureSet(("de",), EXAMPLES)]
    with pytest.raises(InputError, match=says):
        train_features(model, sets, FeatureSettings({"de": 2}, target_modules=targets), RUN)


def test_a_rate_that_diverges_does_not_end_a_sweep(
    base_dir: Path, adapter_dirs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.jsonl").write_text('{"input": "Anna", "output": "Tom"}\n' * 12)
    inputs = CompositionInputs(
        {"a": adapter_dirs[0], "b": adapter_dirs[1]},
        Source(tmp_path / "data.jsonl", "{input}", tuning=4),
        names=("a", "b"),
    )
    settings = TrainSettings(steps=3, batch_size=2, warmup=0.0)
    how = ComposeSettings(base_dir, parse("lc"), settings, (1e-3, 1e36))
    compose_to(tmp_path / "out", "sweep", inputs, how)
    manifest = read_manifest(tmp_path / "out")
    assert [one["learning_rate"] for one in manifest["sweep"]] == [1e-3]
    assert (manifest["learning_rate"], manifest["diverged_rates"]) == (1e-3, [1e36])
    assert manifest["composed_of"] == ["a", "b"]
    assert manifest["chosen"]["settings"]["method"] == "lc"
    assert "this rate is left out" in " ".join(capsys.readouterr().err.split())
    compose_to(tmp_path / "out", "sweep", inputs, how)
    assert "up to date" in capsys.readouterr().err, "a rate that diverged is not tried again"
    both = ComposeSettings(base_dir, parse("lc"), settings, (1e35, 1e36))
    with pytest.raises(InputError, match="both: diverged at every rate: "):
        compose_to(tmp_path / "both", "both", inputs, both)
    one = ComposeSettings(base_dir, parse("lc"), settings, (1e36,))
    with pytest.raises(Diverged):
        compose_to(tmp_path / "one", "one", inputs, one)
    assert not (tmp_path / "one").exists()


def test_adapters_that_name_other_bases_compose_when_told_to(
    base_dir: Path, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    """Their shapes are compared with the base's all the same."""
    places = []
    for index, path in enumerate(adapter_dirs):
        places.append(shutil.copytree(path, tmp_path / str(index)))
        file = places[-1] / "adapter_config.json"
        named = {"base_model_name_or_path": f"hub/base-{index}"}
        file.write_text(json.dumps(json.loads(file.read_text()) | named))
    command = ["calibrate", "--method", "exact", "--base", base_dir, "--out", "out"]
    command += [flag for place in places for flag in ("--adapter", place)]
    done = forked(*command, cwd=tmp_path)
    assert done.returncode == 2
    assert "expected adapters of one base (--any-base, or calibration.any_base" in done.stderr
    done = forked(*command, "--any-base", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "was trained on hub/base-1, the base given is" in " ".join(done.stderr.split())
    assert forked("audit", *places, cwd=tmp_path).returncode == 2
    assert forked("audit", *places, "--any-base", cwd=tmp_path).returncode == 0
