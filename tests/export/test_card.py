"""What travels with an artifact: generation settings and a card whose every word can be checked."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

from caliport.api import compose
from caliport.core.directories import read_manifest
from caliport.core.outputs import new_directory
from caliport.export.package.card import describe, describe_adapter, origin_of, write_card
from caliport.export.package.generation import save_generation_config
from caliport.stages.compose import pick
from caliport.stages.sweep import at_best_rate
from tests.exports import to_executorch_bundle, to_onnx_bundle
from tests.forking import forked
from tests.sampling import thorough

RUNTIMES = ("onnx", "executorch")


@pytest.fixture(params=RUNTIMES)
def artifact(request: pytest.FixtureRequest, artifacts: Path) -> Path:
    return artifacts / request.param


def test_the_card_says_what_the_manifest_says(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    card = ModelCard.load(artifact / "README.md")
    assert card.data.library_name == artifact.name
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["caliport", artifact.name, "int8", "lora"]
    assert "base_model" not in card.data.to_dict(), "a directory is no name on the Hub"
    for name, facts in manifest["files"].items():
        if name != "README.md":
            assert f"| `{name}` | {facts['bytes']:,} |" in card.content
    for package, version in manifest["versions"].items():
        assert f"{package} {version}" in card.content
    assert f"| context | {manifest['context']} tokens" in card.content
    assert "| 8 bits per output channel, max-abs, symmetric, scale float32 |" in card.content
    assert "LORA of rank 4 on `down_proj`, `gate_proj`, `k_proj`" in card.content
    assert "LlamaForCausalLM, 2 layers of width 64, 384 tokens" in card.content


def test_nothing_that_travels_names_this_machine(
    artifact: Path, base_dir: Path, adapter_dirs: list[Path]
) -> None:
    places = [str(base_dir), str(adapter_dirs[0]), str(artifact.parent), str(Path.home())]
    for path in artifact.iterdir():
        content = path.read_bytes()
        assert [p for p in places if len(p) > 3 and p.encode() in content] == [], path.name


@pytest.mark.parametrize("chat", [True, False])
def test_the_cards_code_runs(artifact: Path, chat: bool, tmp_path: Path) -> None:
    """As it stands, from the directory; also where the tokenizer has no chat template."""
    if not chat:
        artifact = shutil.copytree(artifact, tmp_path / artifact.name)
        (artifact / "chat_template.jinja").unlink()
        write_card(artifact, read_manifest(artifact))
    code = re.search(r"```python\n(.*?)```", (artifact / "README.md").read_text(), re.DOTALL)
    assert code is not None
    done = forked(cwd=artifact, code=code[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_settings_and_template_travel(artifact: Path, base_dir: Path) -> None:
    settings = GenerationConfig.from_pretrained(artifact)
    theirs = AutoTokenizer.from_pretrained(base_dir)
    ours = AutoTokenizer.from_pretrained(artifact)
    assert settings.eos_token_id == [theirs.eos_token_id]
    assert settings.bos_token_id == theirs.bos_token_id
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens_map == theirs.special_tokens_map
    if artifact.name == "onnx":
        genai = json.loads((artifact / "genai_config.json").read_text())["model"]
        assert genai["eos_token_id"] == settings.eos_token_id
    else:
        constants = read_manifest(artifact)["lowering"]["constant_methods"]
        assert constants["get_eos_ids"] == settings.eos_token_id


def test_the_bases_own_settings_are_kept(tmp_path: Path) -> None:
    """Also those that transformers refuses to save: a temperature without sampling."""
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "do_sample": False, "top_k": 7, "eos_token_id": 9})
    )
    LlamaConfig().save_pretrained(tmp_path)
    (tmp_path / "out").mkdir()
    save_generation_config(tmp_path, LlamaConfig(), tmp_path / "out", [2, 3], 1)
    found = json.loads((tmp_path / "out/generation_config.json").read_text())
    kept = {k: found[k] for k in ("temperature", "top_k", "eos_token_id", "bos_token_id")}
    assert kept == {"temperature": 0.6, "top_k": 7, "eos_token_id": [2, 3], "bos_token_id": 1}


def test_a_composed_adapter_says_how_it_was_made(adapter_dirs: list[Path], tmp_path: Path) -> None:
    adapter = shutil.copytree(adapter_dirs[0], tmp_path / "adapter")
    inputs = {"base": "0", " adapter summarize": "1", " adapter translate_es": "2"}
    manifest = {"stage": "compose", "settings": {"method": "lc++"}, "inputs": inputs}
    (adapter / "manifest.json").write_text(json.dumps(manifest))
    config = LlamaConfig(architectures=["LlamaForCausalLM"])
    facts = describe("some/base", config, adapter)
    assert facts["base"]["name"] == "some/base"
    assert facts["adapter"]["method"] == "lc++"
    assert facts["adapter"]["composed_of"] == ["summarize", "translate_es"]
    facts |= {"runtime": "onnx", "precision": "fp32", "context": 8, "lowering": {"backend": "b"}}
    write_card(tmp_path, facts | {"scheme": {"linear": {"bits": 32}}})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "some/base"
    assert "made by `lc++` from summarize, translate_es" in card.content


@pytest.fixture(scope="module", params=["onnx", thorough("executorch")])
def bundle(
    request: pytest.FixtureRequest,
    one_layer: tuple[Path, list[Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    base_dir, adapter_dirs = one_layer
    out = tmp_path_factory.mktemp("bundles") / request.param
    parts = {"first": adapter_dirs[0], "second": adapter_dirs[1]}
    if request.param == "onnx":
        return to_onnx_bundle(base_dir, parts, out, precision="int8", context=96)
    shared = {"task": adapter_dirs[0]}
    return to_executorch_bundle(base_dir, parts, out, adapters=shared, precision="int8", context=96)


def test_the_card_of_a_bundle_runs_a_composition(bundle: Path) -> None:
    """And a bundle has what every artifact has."""
    manifest = read_manifest(bundle)
    assert manifest["quantization"]["int8_layers"] == []
    assert manifest["sizes"]["bits_per_weight"] > 8
    assert GenerationConfig.from_pretrained(bundle).eos_token_id is not None
    card = (bundle / "README.md").read_text()
    for name, facts in manifest["bundle"]["compositions"].items():
        words = f"| composition `{name}` | LORA of rank 4 on `down_proj`"
        assert words in card
        assert f"{facts['bytes']:,} bytes of its own" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    assert "first" in code[1]
    done = forked(cwd=bundle, code=code[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_swept_adapter_says_how_it_was_made(adapter_dirs: list[Path], tmp_path: Path) -> None:
    """And one that was picked from a training for several compositions."""

    def make(place: Path, title: str, rate: float, tune: bool) -> None:
        inputs = {"base": "0", "sum adapter a": "1", "sum adapter b": "2", "other adapter c": "3"}
        with new_directory(place, "compose", inputs, {"method": "lc++"}) as (partial, extra):
            for name in ("", "sum"):
                shutil.copytree(adapter_dirs[0], partial / name, dirs_exist_ok=True)
            extra["tuning_loss"] = rate

    at_best_rate(tmp_path / "swept", "sum", (0.1, 0.2), make)
    assert describe_adapter(tmp_path / "swept")["method"] == "lc++"
    assert describe_adapter(tmp_path / "swept")["composed_of"] == ["a", "b", "c"]
    pick(tmp_path / "picked", "sum", tmp_path / "swept", "sum", "{input}")
    assert describe_adapter(tmp_path / "picked")["method"] == "lc++"
    assert describe_adapter(tmp_path / "picked")["composed_of"] == ["a", "b"]


def test_a_composed_adapter_names_directories(
    base_dir: Path, adapter_dirs: list[Path], tmp_path: Path
) -> None:
    compose(base_dir, adapter_dirs, tmp_path / "composed")
    facts = describe_adapter(tmp_path / "composed")
    assert facts["composed_of"] == ["task0", "task1"]
    assert facts["method"] == "linear"


def test_a_manifest_that_does_not_say_how_it_was_made() -> None:
    for odd in (
        {"settings": [3], "inputs": 3},
        {"chosen": 3},
        {"method": 3, "composed_of": [None]},
        {},
    ):
        assert origin_of(odd) == {}


def test_activations_are_as_the_runtime_rounds_them(artifact: Path) -> None:
    found = read_manifest(artifact)["scheme"]["activations"]
    card = (artifact / "README.md").read_text()
    if artifact.name == "onnx":
        assert (found["granularity"], found["symmetric"]) == ("block", True)
        assert "8 bits per block, dynamic, symmetric" in card
    else:
        assert (found["granularity"], found["symmetric"]) == ("token", False)
        assert "8 bits per token, dynamic, asymmetric" in card
