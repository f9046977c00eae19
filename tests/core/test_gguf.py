"""A ``.gguf`` file as a base: converted once, and what cannot be read refused in one line."""

from __future__ import annotations

import json
import os
import struct
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import caliport
from caliport.core.checkpoints import (
    encode_prompt,
    eos_ids,
    load_base,
    load_config,
    load_generation,
    load_tokenizer,
)
from caliport.core.directories import file_hash, read_manifest
from caliport.core.errors import InputError
from caliport.core.model_files import gguf_base, gguf_child
from caliport.core.model_files.base_files import check_base_files
from caliport.core.model_files.gguf_base import as_directory
from caliport.core.places import cache_directory
from tests.exports import to_onnx
from tests.ggufs import write_gguf


@pytest.fixture(scope="session")
def tiny(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base as a ``.gguf`` file in float32."""
    return write_gguf(base_dir, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def test_same_model_and_tokenizer(tiny: Path, base_dir: Path, prompts: list[list[int]]) -> None:
    model, wanted = load_base(tiny), load_base(base_dir)
    for name, value in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    with torch.no_grad():
        ids = torch.tensor([prompts[1]])
        assert torch.equal(model(ids).logits, wanted(ids).logits)
    tokenizer, theirs = load_tokenizer(tiny, model), load_tokenizer(base_dir)
    text = "Anna and Tom  meet at 12:30.\n\tTennis für alle"
    assert encode_prompt(tokenizer, text) == encode_prompt(theirs, text)
    assert tokenizer.decode(encode_prompt(theirs, text)) == theirs.decode(
        encode_prompt(theirs, text)
    )
    assert eos_ids(model) == eos_ids(wanted)
    assert load_config(tiny)[0].max_position_embeddings == 128
    assert load_generation(tiny) is not None


def test_is_converted_once(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = Path(as_directory(tiny))
    capsys.readouterr()
    begun = time.perf_counter()
    assert as_directory(tiny) == first
    assert as_directory(str(tiny)) == first
    assert time.perf_counter() - begun < 1
    assert not capsys.readouterr().out
    assert first.name.startswith("tiny-")
    assert read_manifest(first)["inputs"] == {"file": file_hash(tiny)}
    assert as_directory(first) == first
    assert as_directory("org/name.gguf") == "org/name.gguf"


def test_exports_as_its_directory_does(tiny: Path, tmp_path: Path) -> None:
    ours = to_onnx(tiny, tmp_path / "file", precision="int4")
    theirs = to_onnx(as_directory(tiny), tmp_path / "directory", precision="int4")
    one, two = read_manifest(ours), read_manifest(theirs)
    assert one["inputs"]["base"] == file_hash(tiny)
    assert one["base"] == {**two["base"], "file": "tiny.gguf"}
    assert "`tiny.gguf`" in (ours / "README.md").read_text()
    changed = {"README.md"}
    assert {k: v for k, v in one["files"].items() if k not in changed} == {
        k: v for k, v in two["files"].items() if k not in changed
    }
    report = caliport.validate(ours, tiny)
    assert {gate.name: gate.passed for gate in report.artifacts[0].gates}["weights"]


def test_adapters_are_made_on_it(tiny: Path, adapter_dirs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"input": "meet", "output": "tennis"}\n' * 4)
    caliport.compose(
        *(tiny, adapter_dirs, tmp_path / "both"),
        method="lc",
        data=tmp_path / "data.jsonl",
        training={"steps": 1, "batch_size": 2},
    )
    manifest = read_manifest(tmp_path / "both")
    assert manifest["inputs"]["base"] == file_hash(tiny)
    assert json.loads((tmp_path / "both/adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(tiny)
    to_onnx(tiny, tmp_path / "out", adapter=tmp_path / "both")


def _header(*parts: object, tensors: int = 1, keys: int = 1, version: int = 3) -> bytes:
    """A GGUF header of words: numbers as 64 bits, 32 bits in a tuple, text with its length."""
    found = b"GGUF" + struct.pack("<IQQ", version, tensors, keys)
    for part in parts:
        if isinstance(part, str):
            found += struct.pack("<Q", len(part)) + part.encode()
        elif isinstance(part, tuple):
            found += struct.pack("<I", *part)
        else:
            found += part if isinstance(part, bytes) else struct.pack("<Q", part)
    return found


_ARCH = ("general.architecture", (8,), "llama")
_F32, _Q4 = (0,), (2,)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a GGUF file"),
        (b"PK\x03\x04" + b"x" * 100, "not a GGUF file"),
        (b"GGUF", "where the file ends"),
        (b"GGUF" + struct.pack(">IQQ", 3, 1, 1), "big-endian"),
        (_header(version=1), "of version 1"),
        (_header(tensors=0), "tensors is 0, expected an integer from 1 to 65536"),
        (_header(tensors=2**63), "tensors is an integer of more than 18 digits"),
        (_header(keys=2**40), "keys is 1099511627776"),
        (_header(2**62), "bytes of a key is"),
        (_header(100, b"short"), "where the file ends"),
        (_header("a", (8,), 2**21 + 1), "bytes of 'a' is 2097153"),
        (_header("a", (8,), 2, b"\xff\xfe"), "'a' is not UTF-8"),
        (_header("a", (13,)), "'a' is of type 13, which GGUF has not"),
        (_header("a", (9,), (4,), 2**60), "elements of 'a' is"),
        (_header("a", (9,), (8,), 3_000_000, 5), "where the file ends"),
        (_header("a", (9,), (9,), 1), "'a' is an array of type 9, not read"),
        (_header("a", (7,), b"\1", "a", (7,), b"\1", keys=2), "has the key 'a' twice"),
        (_header("\x1b[2J", (13,)), "'\\x1b[2J' is of type 13"),
        (_header(*_ARCH, "w", (5,)), "'w': dimensions is 5, expected an integer from 1 to 4"),
        (_header(*_ARCH, "w", (1,), 0), "'w': a dimension is 0"),
        (
            _header(*_ARCH, "w", (2,), 2**40, 2**40, _F32, 0),
            "'w' is [1099511627776, 1099511627776]",
        ),
        (_header(*_ARCH, "w", (1,), 8, (999,), 0), "'w' is of type 999"),
        (_header(*_ARCH, "w", (1,), 33, _Q4, 0), "expected rows of a multiple of 32 values"),
        (_header(*_ARCH, "w", (1,), 8, _F32, 0), "'w' ends 32 bytes beyond the file"),
        (_header(*_ARCH, "w", (1,), 1, _F32, 2**63, b"\0" * 999), "bytes beyond the file"),
        (
            _header(
                *_ARCH, *("v", (1,), 9, _F32, 0), *("w", (1,), 9, _F32, 32), b"\0" * 999, tensors=2
            ),
            "'w' overlaps another tensor",
        ),
        (
            _header(*_ARCH, *("w", (1,), 8, _F32, 0), *("w", (1,), 8, _F32, 32), tensors=2),
            "has the tensor 'w' twice",
        ),
        (
            _header("general.alignment", (4,), (0,), keys=1),
            "general.alignment is 0, expected an integer from 1",
        ),
        (_header("general.alignment", (8,), "x", keys=1), "general.alignment is 'x'"),
        (_header("a", (7,), b"\1", "w", (1,), 1, _F32, 0, b"\0" * 99), "architecture is None"),
        (
            _header("general.architecture", (8,), "../x", "w", (1,), 1, _F32, 0, b"\0" * 99),
            "architecture is '../x', expected a name such as llama",
        ),
        (
            _header("general.type", (8,), "adapter", "w", (1,), 1, _F32, 0, b"\0" * 99),
            "general.type is 'adapter', expected a .gguf file of a whole language model",
        ),
        (
            _header("split.count", (2,), b"\3\0", "w", (1,), 1, _F32, 0, b"\0" * 99),
            "one part of a split model",
        ),
    ],
)
def test_bad_headers(content: bytes, says: str, tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(content)
    _refused(file, says, cache)


def test_bad_files(tiny: Path, tmp_path: Path, cache: Path) -> None:
    whole = tiny.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "x-00001-of-00002.gguf").write_bytes(whole)
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "device.gguf").symlink_to("/dev/zero")
    for name, says in {
        "cut.gguf": "bytes beyond the file; expected the whole file: fetch it again",
        "x-00001-of-00002.gguf": "one part of a split model",
        "pipe.gguf": "not a regular file",
        "device.gguf": "not a regular file",
        "gone.gguf": "no such directory; expected a Hugging Face checkpoint or a .gguf file",
    }.items():
        _refused(tmp_path / name, says, cache)
    with pytest.raises(InputError, match=r"no config\.json; .*; name the file cut\.gguf itself"):
        check_base_files(tmp_path)


def _refused(file: Path, says: str, cache: Path) -> None:
    before = sorted(cache.rglob("*.json"))
    begun = time.perf_counter()
    with pytest.raises(InputError) as refused:
        check_base_files(file)
    assert time.perf_counter() - begun < 60
    assert str(file) in str(refused.value)
    assert says in str(refused.value)
    assert sorted(cache.rglob("*.json")) == before


HEAD = torch.ones(384, 64)


@pytest.mark.parametrize(
    ("fields", "tensors", "says"),
    [
        ({"general.architecture": "nothing"}, {}, "transformers cannot read it (GGUF model with"),
        ({"general.architecture": "t5"}, {}, "a sequence-to-sequence model, expected a causal"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "scaling.type' is 'yarn', which transformers"),
        ({"llama.rope.scaling.factor": 8.0}, {}, "factor' is 8.0, which transformers does not"),
        ({"llama.attention.value_length": 99}, {}, "value_length' is 99, which transformers"),
        ({"llama.expert_count": 8}, {}, "'llama.expert_count' is 8, which transformers"),
        ({"llama.block_count": 10**6}, {}, "num_hidden_layers is 1000000, expected"),
        ({"llama.embedding_length": 2**31}, {}, "hidden_size is 2147483648, expected"),
        ({"llama.block_count": 3}, {}, "has no 'model.layers.2."),
        ({"llama.block_count": 1}, {}, "of which transformers reads"),
        ({"llama.embedding_length": 32}, {}, "cannot read it"),
        ({"llama.attention.head_count": 3}, {}, "cannot read it"),
        ({"llama.attention.head_count": 0}, {}, "cannot read it"),
        ({"tokenizer.ggml.pre": "new-way"}, {}, "tokenizer.ggml.pre is 'new-way', a way to"),
        ({"tokenizer.ggml.pre": None}, {}, "tokenizer.ggml.pre is None, a way to split text"),
        ({"tokenizer.ggml.model": "bert"}, {}, "cannot read it"),
        ({"tokenizer.ggml.tokens": None}, {}, "cannot read it"),
        ({"tokenizer.ggml.merges": ["x"]}, {}, "cannot read it"),
        (
            {"tokenizer.ggml.eos_token_id": 99999},
            {},
            "its settings: eos_token_id is 99999, expected",
        ),
        ({"llama.attention.head_count_kv": None}, {}, "has no llama.attention.head_count_kv"),
        ({}, {"blk.0.ffn_up.weight": None}, "has no 'model.layers.0.mlp.up_proj.weight'"),
        ({}, {"blk.0.extra.weight": HEAD}, "of which transformers reads"),
        ({}, {"rope_freqs.weight": torch.arange(1, 9)}, "rope_freqs.weight has factors that are"),
    ],
)
def test_what_transformers_would_pass_over(
    fields: dict[str, Any], tensors: dict[str, Any], says: str, base_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    write_gguf(base_dir, tmp_path / "in" / gguf_child.FILE, fields, tensors)
    assert says in _child_says(tmp_path)


def _child_says(place: Path) -> str:
    """What the child answers, run in this process and without its limits."""
    return gguf_child.answer(place / "in", place / "out", 0).get("error", "")


def test_what_it_reads_besides(base_dir: Path, tmp_path: Path) -> None:
    """Llama 3's rotary scaling, single digits, a second end token, a head, 8-bit blocks."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.from_pretrained(base_dir)
    plain = 10_000 ** -(torch.arange(8) / 8)
    theta = config.rope_parameters["rope_theta"]
    config.rope_parameters = {
        **{"rope_type": "llama3", "rope_theta": theta, "factor": 32.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    }
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    (tmp_path / "in").mkdir()
    write_gguf(
        *(base_dir, tmp_path / "in" / gguf_child.FILE),
        {"tokenizer.ggml.pre": "smollm", "tokenizer.ggml.eot_token_id": 4},
        {"rope_freqs.weight": plain / scaled, "output.weight": HEAD},
        gguf.GGMLQuantizationType.Q8_0,
    )
    assert not _child_says(tmp_path)
    made = AutoConfig.from_pretrained(tmp_path / "out")
    assert made.rope_parameters["factor"] == pytest.approx(32)
    assert made.rope_parameters["rope_type"] == "llama3"
    assert not made.tie_word_embeddings
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 4]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("a  12")
    assert tokens[-2:] == ["1", "2"]
    torch.testing.assert_close(
        load_base(tmp_path / "out").lm_head.weight.detach(), HEAD, rtol=0, atol=1e-3
    )


def test_limits_of_the_child(
    base_dir: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(base_dir, tmp_path / "x.gguf", {"general.name": "another"})
    monkeypatch.setattr(gguf_base, "_ADDRESSES", 100 * 2**20)
    with pytest.raises(InputError, match=r"x\.gguf: (takes more than|.*expected the model's saf)"):
        as_directory(file)
    monkeypatch.setattr(gguf_base, "_ADDRESSES", 12 * 2**30)
    monkeypatch.setattr(gguf_base, "_SECONDS", 1)
    with pytest.raises(InputError, match=r"x\.gguf: converting it (ends with SIG|takes more)"):
        as_directory(file)
    monkeypatch.setattr(gguf_base, "available_memory", lambda: 10**6)
    _refused(file, "converting it needs about 0.8 GB of memory, 0.0 GB are there", cache)


def test_two_at_once_convert_once(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def convert(file: Path, header: object, out: Path) -> None:
        time.sleep(0.5)
        made.append(out)
        (out / "config.json").write_text("{}")

    file = write_gguf(base_dir, tmp_path / "x y.gguf", {"general.name": "twice"})
    monkeypatch.setattr(gguf_base, "_convert", convert)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(as_directory, (file, str(file)))
    assert first == second
    assert len(made) == 1
    assert Path(first).name.startswith("x_y-")
    before = first
    file.write_bytes(file.read_bytes()[:-1] + b"\1")  # what is in it counts, not its name or time
    assert as_directory(file) != before
    assert len(made) == 2


def test_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory("gguf") == tmp_path / ".cache/caliport/gguf"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place = tmp_path / f"caliport-{os.getuid()}"
    assert cache_directory("gguf") == place / "gguf"
    assert place.stat().st_mode & 0o777 == 0o700
    place.chmod(0o777)
    with pytest.raises(InputError, match="is not this user's own; name a writable XDG_CACHE_HOME"):
        cache_directory("gguf")
