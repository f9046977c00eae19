"""Bases from strangers: each that is not one model to all readers is refused in one line."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from caliport.core.checkpoints import eos_ids, load_base, load_config
from caliport.core.errors import InputError
from caliport.core.model_files.base_files import check_base_files, tensors_of
from caliport.core.model_files.base_model import check_base
from caliport.export.api import export
from caliport.export.decoder.stored import reading

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def base(base_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base_dir, tmp_path / "base"))


def set_json(path: Path, **values: object) -> None:
    """Change values of a JSON file; None removes one."""
    found = json.loads(path.read_text()) if path.exists() else {}
    found |= values
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def set_weights(base: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = base / "model.safetensors"
    tensors = {name: value.clone() for name, value in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def refused(base: Path, says: str) -> None:
    """Every way in says the same line."""
    lines = set()
    for reader in (check_base, load_base, load_config):
        with pytest.raises(InputError) as info:
            reader(base)
        lines.add(str(info.value))
    assert len(lines) == 1
    assert says in lines.pop()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, expected an integer"),
        ({"num_hidden_layers": 3}, "config.json says num_hidden_layers 3, the weights have 2"),
        ({"num_hidden_layers": 1}, "config.json says num_hidden_layers 1, the weights have 2"),
        ({"num_hidden_layers": 900}, "config.json says num_hidden_layers 900, the weights have 2"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, expected an integer"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0, expected an integer"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000, expected an integer"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"hidden_size": 10**400}, "hidden_size is an integer of more than 18 digits"),
        ({"hidden_size": 128}, "the model of config.json has [384, 128]"),
        ({"head_dim": 2**20}, "the model of config.json has [2097152, 64]"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"vocab_size": 1000}, "the model of config.json has [1000, 64]"),
        ({"rms_norm_eps": float("nan")}, "NaN is not JSON"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1, expected a number from 0 to 1"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor is 0, expected"),
        ({"rope_parameters": [1]}, "rope_parameters is [1], expected an object"),
        ({"rope_parameters": {"rope_type": "no"}}, "not loadable as a"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or"),
        ({"tie_word_embeddings": False}, "no lm_head.weight, which the model of config.json has"),
        ({"eos_token_id": 99999}, "eos_token_id is 99999, expected an integer from 0 to 383"),
        ({"eos_token_id": -7}, "eos_token_id is -7"),
        ({"eos_token_id": [[1]]}, "eos_token_id is [1]"),
        ({"eos_token_id": [1, True]}, "eos_token_id is True"),
        ({"eos_token_id": "1"}, "eos_token_id is '1'"),
        ({"model_type": "zzz"}, "model type `zzz`"),
        ({"model_type": "t5"}, "a sequence-to-sequence model"),
        ({"model_type": "\x1b[31m"}, "\\x1b[31m"),
        ({"auto_map": ["x.Y"]}, "auto_map is ['x.Y'], expected an object"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation is 'someone/kernel'"),
        ({"transformers_weights": "../x.safetensors"}, "transformers_weights is '../x.safet"),
        ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files is"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config says 'gptq', a"),
        ({"quantization_config": {"quant_method": "fp8"}}, "expected a base in 16 or 32 bits"),
        ({"dtype": "evil"}, "not loadable as a model's config"),
    ],
)
def test_settings_beyond_reason(base: Path, values: dict[str, Any], says: str) -> None:
    set_json(base / "config.json", **values)
    refused(base, says)


@pytest.mark.parametrize(
    "values",
    [
        {"eos_token_id": [1, 2]},
        {"head_dim": None},
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": None, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_parameters": None, "rope_theta": 10000, "rope_scaling": None},
        {"dtype": None, "torch_dtype": "float16"},
        {"dtype": "bfloat16"},
        {"pad_token_id": -1},
        {"auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}},
        {"auto_map": {"AutoConfig": "who/code--c.C"}},
    ],
)
def test_settings_of_the_wild(
    base: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*texts: object) -> str:
        raise AssertionError(f"asked on the terminal: {texts}")

    monkeypatch.setattr(builtins, "input", asked)
    set_json(base / "config.json", **values)
    (base / "c.py").write_text("raise SystemExit('code of a stranger')")
    assert load_base(base).num_parameters() > 0


def test_code_of_an_unknown_type_is_refused_unasked(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    set_json(base / "config.json", model_type="zzz", auto_map={"AutoConfig": "c.C"})
    (base / "c.py").write_text("raise SystemExit('code of a stranger')")
    refused(base, "contains custom code")


def deep(path: Path) -> None:
    path.write_text("[" * 10_000 + "]" * 10_000)


def large(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(100_000_000)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def outside(path: Path) -> None:
    place = path.parent.parent / f"outside-{path.name}"
    if path.exists():
        path.rename(place)
    else:
        place.write_text("{}")
    path.symlink_to(place)


def cut(path: Path) -> None:
    path.write_text('{"eos_token_id": [1, 2')


def array(path: Path) -> None:
    path.write_text("[]")


@pytest.mark.parametrize(
    ("name", "break_it", "says"),
    [
        ("config.json", deep, "nested too deep"),
        ("config.json", large, "100,000,000 bytes, expected at most"),
        ("config.json", device, "not a regular file"),
        ("config.json", pipe, "not a regular file"),
        ("config.json", outside, "expected a file inside that directory"),
        ("config.json", array, "found list, expected a JSON object"),
        ("generation_config.json", cut, "generation_config.json: not JSON"),
        ("generation_config.json", deep, "nested too deep"),
        ("generation_config.json", device, "not a regular file"),
        ("generation_config.json", pipe, "not a regular file"),
        ("generation_config.json", outside, "expected a file inside that directory"),
        ("model.safetensors", device, "not a regular file"),
        ("model.safetensors", outside, "expected a file inside that directory"),
        ("model.safetensors", array, "no complete header; the file is truncated"),
        ("model.safetensors.index.json", device, "not a regular file"),
        ("model.safetensors.index.json", array, "found list, expected a JSON object"),
        ("adapter_config.json", array, "an adapter beside a base"),
        ("shard-00001-model-00001-of-00001.safetensors", array, "a distributed checkpoint"),
    ],
)
def test_files(base: Path, name: str, break_it: Callable[[Path], None], says: str) -> None:
    break_it(base / name)
    refused(base, says)


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        (99999, "eos_token_id is 99999, expected an integer from 0 to 383"),
        ([1, -7], "eos_token_id is -7"),
        ([[1]], "eos_token_id is [1]"),
        (True, "eos_token_id is True"),
        ({"a": 1}, "eos_token_id is {'a': 1}"),
    ],
)
def test_end_tokens_of_generation(base: Path, ends: object, says: str) -> None:
    set_json(base / "generation_config.json", eos_token_id=ends)
    refused(base, says)


def test_end_tokens_as_a_list(base: Path) -> None:
    set_json(base / "generation_config.json", eos_token_id=[1, 2])
    assert eos_ids(load_base(base)) == [1, 2]
    _, generation = load_config(base)
    assert generation is not None


def with_index(base: Path, weight_map: object) -> None:
    (base / "model.safetensors").rename(base / "one.safetensors")
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (base / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({EMBEDDING: "../outside.safetensors"}, "names '../outside.safetensors', expected a"),
        ({EMBEDDING: "/etc/passwd"}, "names '/etc/passwd', expected a"),
        ({EMBEDDING: "/x.safetensors"}, "names '/x.safetensors', expected a"),
        ({EMBEDDING: 5}, "weight_map names 5"),
        ({EMBEDDING: None}, "weight_map names None"),
        ({EMBEDDING: "gone.safetensors"}, "gone.safetensors: no such file"),
        ({EMBEDDING: f"{'x' * 5000}.safetensors"}, "names 'xxxx"),
        ({EMBEDDING: "pytorch_model.bin"}, "names 'pytorch_model.bin', expected a"),
        ({EMBEDDING: "one.safetensors", "a": "two.safetensors"}, "expected each tensor once"),
        ({}, "names 0 files"),
        (None, "weight_map is None, expected an object"),
        ([1], "weight_map is [1], expected an object"),
    ],
)
def test_index(base: Path, weight_map: object, says: str) -> None:
    with_index(base, weight_map)
    shutil.copy(base / "one.safetensors", base / "two.safetensors")
    refused(base, says)


def test_an_index_beside_one_file_that_it_does_not_name(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    save_file(weights, base / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-1.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(base, "has model.safetensors and an index that names 'model-1.safetensors'")


def test_files_that_no_index_names_do_not_count(base: Path, base_dir: Path) -> None:
    """As with Mistral's and Llama's own consolidated weights beside those for transformers."""
    names = list(load_file(base / "model.safetensors"))
    with_index(base, dict.fromkeys(names, "one.safetensors"))
    (base / "consolidated.safetensors").write_bytes(b"other")
    assert set(tensors_of(base)) == set(names)
    wanted = load_base(base_dir).state_dict()
    found = load_base(base).state_dict()
    with reading(base) as read:
        for name in names:
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=0)
            torch.testing.assert_close(read(name), wanted[name], rtol=0, atol=0)


def test_a_hub_cache_links_into_blobs(base_dir: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "cafe"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in base_dir.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert load_base(snapshot).num_parameters() > 0


def beside(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {**weights, name: value}


def renamed(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {f"{prefix}{name}": value for name, value in weights.items()}


def cast(dtype: torch.dtype, **more: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """The projections in another type, and tensors beside the first."""
    part = Q_PROJ.removesuffix(".weight")
    return lambda weights: {
        **{n: v.to(dtype) if n.endswith("proj.weight") else v for n, v in weights.items()},
        **{f"{part}.{name}": value for name, value in more.items()},
    }


def poisoned(value: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        weights[EMBEDDING][300, 3] = value
        return weights

    return change


ONE = torch.ones(1)
BYTES = torch.ones(8, 8, dtype=torch.uint8)
WORDS = torch.ones(8, 8, dtype=torch.int32)
F8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (cast(F8, weight_scale_inv=ONE), "quantized, float8 in blocks (weight_scale_inv)"),
        (cast(F8), "is stored as 'F8_E4M3', expected F64, F32, F16, BF16"),
        (cast(torch.int8, SCB=ONE), "quantized, int8 of bitsandbytes (SCB)"),
        (cast(torch.int8, weight_scale=ONE), "quantized, 8 bits (weight_scale)"),
        (cast(torch.int8), "is stored as 'I8'"),
        (cast(torch.int32), "is stored as 'I32'"),
        (beside(f"{Q_PROJ}.absmax", BYTES), "quantized, 4 bits of bnb"),
        (beside(f"{Q_PROJ}.quant_state.bitsandbytes__nf4", BYTES), "4 bits of bnb"),
        (cast(torch.float16, qweight=WORDS, g_idx=WORDS), "quantized, GPTQ"),
        (cast(torch.float16, qweight=WORDS, qzeros=WORDS), "quantized, GPTQ or AWQ"),
        (cast(torch.float16, weight_packed=WORDS), "quantized, compressed-tensors"),
        (beside("model.layers.0.mlp.up_proj.bias", ONE), "up_proj.bias is not in the model"),
        (beside("score.weight", ONE), "score.weight is not in the model of config.json"),
        (beside("lm_head.weight", torch.ones(384, 64)), "tie_word_embeddings is true, but"),
        (renamed("base_model.model."), "has a prefix of PEFT: merge the adapter"),
        (renamed("_orig_mod."), "has a prefix of torch.compile"),
        (renamed("module."), "has a prefix of DataParallel"),
        (lambda weights: {k: v for k, v in weights.items() if k != Q_PROJ}, f"no {Q_PROJ}, which"),
        (lambda weights: {}, "no weights"),
        (lambda weights: {**weights, Q_PROJ: torch.ones(3, 64)}, "is [3, 64], the model of"),
    ],
)
def test_weights_that_are_not_the_models(
    base: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], says: str
) -> None:
    set_weights(base, change)
    refused(base, says)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite(base: Path, tmp_path: Path, value: float) -> None:
    """In a row that no prompt looks up."""
    set_weights(base, poisoned(value))
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight has NaN or infinite"):
        load_base(base)
    with pytest.raises(InputError, match="NaN or infinite"):
        export(base, tmp_path / "out", runtime="onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {**weights, "lm_head.weight": weights[EMBEDDING].clone()},
        lambda weights: {
            **{k: v for k, v in weights.items() if k != EMBEDDING},
            "lm_head.weight": weights[EMBEDDING],
        },
        renamed(""),
        beside("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8)),
        lambda weights: {k.removeprefix("model."): v for k, v in weights.items()},
        lambda weights: {k: v.to(torch.bfloat16) for k, v in weights.items()},
    ],
)
def test_weights_as_people_have_them(
    base: Path, base_dir: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    set_weights(base, change)
    found, wanted = load_base(base).state_dict(), load_base(base_dir).state_dict()
    with reading(base) as read:
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-2, atol=1e-2)
            if name != "lm_head.weight":
                torch.testing.assert_close(read(name).float(), found[name], rtol=0, atol=0)


def test_a_padded_vocabulary(base: Path) -> None:
    set_json(base / "config.json", vocab_size=448)
    set_weights(base, lambda w: {**w, EMBEDDING: torch.cat([w[EMBEDDING], torch.zeros(64, 64)])})
    assert load_base(base).get_input_embeddings().num_embeddings == 448


def header(path: Path, text: str, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "not JSON of dtype"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "not JSON of dtype"),
        ('{"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}', "not JSON of dtype"),
        ('{"a": {"dtype": 5, "shape": [1], "data_offsets": [0, 4]}}', "not JSON of dtype"),
        ('{"a": {"dtype": "F32", "shape": [1000000], "data_offsets": [0, 4]}}', "has 4 bytes"),
        (
            '{"a": {"dtype": "F32", "shape": [4611686018427387904, 9], "data_offsets": [0, 4]}}',
            "is",
        ),
        ('{"a": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}', "begins at 2, expected 0"),
        ('{"a": null}', "is None"),
        ("[]", "header is not JSON"),
        ("[" * 5000 + "]" * 5000, "nested too deep"),
        ('{"a": NaN}', "NaN is not JSON"),
    ],
)
def test_headers(base: Path, text: str, says: str) -> None:
    header(base / "model.safetensors", text, b"1234")
    with pytest.raises(InputError) as info:
        check_base_files(base)
    assert says in str(info.value)


def test_every_stage_begins_with_it(base: Path, adapter_dirs: list[Path], tmp_path: Path) -> None:
    """Before anything is hashed, read or trained."""
    import caliport

    set_json(base / "config.json", num_hidden_layers=3)
    with pytest.raises(InputError, match="num_hidden_layers 3"):
        caliport.export(base, tmp_path / "out", runtime="onnx")
    with pytest.raises(InputError, match="num_hidden_layers 3"):
        caliport.compose(base, adapter_dirs, tmp_path / "out", method="lc", data=tmp_path / "d")
    assert not (tmp_path / "out").exists()
