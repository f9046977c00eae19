"""Adapters from strangers: each ends in one line, in bounded time and memory."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from caliport.calibrate import LowRankUpdate, peft_files, read_peft, write_peft
from caliport.calibrate.bases import check_same_base, note_base
from caliport.calibrate.merges.common import LARGEST_WEIGHT
from caliport.calibrate.merges.registry import MERGES
from caliport.calibrate.patterns import SECONDS, match_patterns
from caliport.core.errors import InputError
from caliport.run.audit import audit_composition

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.fixture
def adapter(adapter_dirs: list[Path], tmp_path: Path) -> Path:
    return shutil.copytree(adapter_dirs[0], tmp_path / "adapter")


def one_line(call: Callable[[], object], says: str) -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match=says) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 2500
    assert time.monotonic() - started < 3 * SECONDS


NESTED = "[" * 10_000 + "]" * 10_000


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank_pattern": {"(": 4}}, "not a regular expression"),
        ({"rank_pattern": {"(a": 4}}, "not a regular expression"),
        ({"rank_pattern": {"q_proj[": 4}}, "not a pattern"),
        ({"rank_pattern": {"[z-a]": 4}}, "not a regular expression"),
        ({"rank_pattern": {"(?=a)": 4}}, "not a pattern"),
        ({"rank_pattern": {"a{999}": 4}}, "not a pattern"),
        ({"rank_pattern": {"(" * 200 + ")" * 200: 4}}, None),
        ({"rank_pattern": {"a" * 2**20: 4}}, "a pattern of 1,048,576 characters"),
        ({"rank_pattern": {"(.|..|a)*" * 12 + "[QZ]": 4}}, "takes more than 2 s to match"),
        ({"alpha_pattern": {"q_proj": 1e38}}, "alpha_pattern.q_proj is 1e.38, expected a number"),
        ({"alpha_pattern": []}, None),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\], expected an object"),
        ({"rank_pattern": {"q_proj": True}}, "rank_pattern.q_proj is True, expected an integer"),
        ({"rank_pattern": {"q_proj": 4.5}}, "rank_pattern.q_proj is 4.5, expected an integer"),
        ({"r": 4.0}, "r is 4.0, expected an integer"),
        ({"r": True}, "r is True"),
        ({"r": "4"}, "r is '4'"),
        ({"r": 0}, "r is 0"),
        ({"r": 10**400}, "r is an integer of more than 18 digits"),
        ({"lora_alpha": 10**400}, "lora_alpha is an integer of more than 18 digits"),
        ({"lora_alpha": 1e308}, r"lora_alpha is 1e\+308, expected a number"),
        ({"lora_alpha": 1e38}, "lora_alpha is 1e.38, expected a number"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": -8}, "lora_alpha is -8"),
        ({"peft_type": "LORA\n"}, r"peft_type is 'LORA\\n', expected LORA"),
        ({"peft_type": {}}, r"peft_type is \{\}"),
        ({"\x1b[31mred": 1}, r"\\x1b\[31mred = 1 is not known"),
        ({"k" * 2**20: 1}, "k… = 1 is not known"),
        ({"use_future": "v" * 2**20}, "is not known"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', expected true or false"),
        ({"use_dora": 1}, "use_dora is 1, expected true or false"),
        ({"bias": ["all"]}, r"bias is \['all'\], expected one of"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', expected a list"),
        ({"init_lora_weights": "x\x1b" * 2**18}, "init_lora_weights = "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_hostile_settings(settings: dict[str, Any], says: str | None, adapter: Path) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    if says is None:
        read_peft(adapter)
    else:
        one_line(lambda: read_peft(adapter), says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (NESTED, "nested too deep"),
        ('{"peft_type": ' + NESTED + "}", "nested too deep"),
        ("[]", "found list, expected a JSON object"),
        ("null", "found NoneType"),
        ('{"r": NaN}', "NaN is not JSON"),
        ('{"r": ' + "1" * 5000 + "}", "not JSON"),
        (" " * (4 * 2**20 + 1), "bytes, expected at most"),
        ("{}", "peft_type is None, expected LORA"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_hostile_settings_files(text: str, says: str, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(text)
    one_line(lambda: read_peft(adapter), says)
    one_line(lambda: check_same_base([adapter]), says)


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(file: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def spoil_header(file: Path, kind: str) -> None:
    header, data = header_of(file)
    match kind:
        case "overlapping":
            header[A]["data_offsets"] = header[B]["data_offsets"]
        case "out-of-range":
            header[A]["data_offsets"] = [0, 10**18]
        case "negative":
            header[A]["data_offsets"] = [-4, 10]
        case "offsets-of-text":
            header[A]["data_offsets"] = ["0", "1"]
        case "shape-too-large":
            header[A]["shape"] = [2**40, 2**40]
        case "shape-of-text":
            header[A]["shape"] = "64"
        case "unknown-type":
            header[A]["dtype"] = "F\x1b[31m"
        case "entry-of-null":
            header[A] = None
        case "list":
            header = [1]  # type: ignore[assignment]
        case "nested":
            header = NESTED.encode()  # type: ignore[assignment]
        case "long-name":
            header["k" * 2**20] = header.pop(A)
        case "red-name":
            header["\x1b[31m.lora_A.weight"] = header.pop(A)
        case "huge-header":
            file.write_bytes(struct.pack("<Q", 2**62) + data)
            return
        case "truncated":
            file.write_bytes(file.read_bytes()[:-1])
            return
        case "empty":
            file.write_bytes(b"")
            return
    with_header(file, header, data)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("overlapping", "begins at"),
        ("out-of-range", "bytes"),
        ("negative", "header is not JSON"),
        ("offsets-of-text", "header is not JSON"),
        ("shape-too-large", "header is not JSON"),
        ("shape-of-text", "header is not JSON"),
        ("unknown-type", "is of type"),
        ("entry-of-null", "header is not JSON"),
        ("list", "header is not JSON"),
        ("nested", "nested too deep"),
        ("long-name", "a tensor's name of 1,048,576 characters"),
        ("red-name", r"\\x1b\[31m"),
        ("huge-header", "truncated"),
        ("truncated", "truncated"),
        ("empty", "truncated"),
    ],
)
def test_hostile_headers(kind: str, says: str, adapter: Path) -> None:
    spoil_header(adapter / "adapter_model.safetensors", kind)
    one_line(lambda: read_peft(adapter), says)


A2, B2 = A.replace(".weight", ".other.weight"), B.replace(".weight", ".other.weight")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a, b: {A: torch.zeros(4, 0)}, "expected a matrix"),
        (lambda a, b: {A: torch.full((4, 64), float("inf"))}, "not finite"),
        (lambda a, b: {A: torch.full((4, 64), 1e200, dtype=torch.float64)}, "not finite"),
        (lambda a, b: {A: a * 1e20, B: b * 1e20}, "not finite or above"),
        (lambda a, b: {A: a.to(torch.float8_e4m3fn)}, "'F8_E4M3', expected one of F64, F32, F16"),
        (lambda a, b: {A: a.to(torch.int32)}, "is of type 'I32'"),
        (lambda a, b: {A: a.bool()}, "is of type 'BOOL'"),
        (lambda a, b: {A: a.to(torch.complex64)}, "is of type 'C64'"),
        (
            lambda a, b: {A.replace(".w", ".default.w"): a, A2: a, B2: b},
            "has adapters default, other; expected one",
        ),
        (lambda a, b: {A.removeprefix("base_model.model."): a}, "is in the file twice"),
        (lambda a, b: {"x.lora_C.weight": a}, "refused, not dropped"),
        (lambda a, b: {"lora_A.weight": a}, "lora_A.weight: a layer of the base saved along"),
        (
            lambda a, b: {A.replace("lora_A.weight", "lora_magnitude_vector"): a[0]},
            "use_dora = False",
        ),
        (lambda a, b: {B.replace("weight", "bias"): b[:, 0]}, "lora_bias = False"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_tensors(change: Callable[..., dict[str, Any]], says: str, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors |= change(tensors[A], tensors[B])
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, file)
    one_line(lambda: read_peft(adapter), says)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("device", "not a regular file"),
        ("pipe", "not a regular file"),
        ("directory", "not a regular file"),
        ("outside", "is outside"),
        ("loop", "(not readable|not a usable path|no )"),
    ],
)
def test_files_that_are_none(
    kind: str, says: str, name: str, adapter: Path, tmp_path: Path
) -> None:
    file = adapter / name
    moved = shutil.move(file, tmp_path / name)
    match kind:
        case "device":
            file.symlink_to("/dev/zero")
        case "pipe":
            os.mkfifo(file)
        case "directory":
            file.mkdir()
        case "outside":
            file.symlink_to(moved)
        case "loop":
            file.symlink_to(file)
    one_line(lambda: read_peft(adapter), says)


def test_files_of_a_hub_cache_are_inside(adapter: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "m/blobs", tmp_path / "m/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in adapter.glob("adapter_*"):
        shutil.move(file, blobs / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert read_peft(snapshot).modules


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("q_proj", {"l.q_proj", "q_proj"}),
        ("l.q_proj", {"l.q_proj"}),
        ("x_q_proj", {"x_q_proj"}),
        ("q.proj", {"l.q_proj", "q_proj"}),
        ("..q_proj", {"l.q_proj", "x_q_proj"}),
        (r"(.*)q_proj", {"l.q_proj", "x_q_proj", "q_proj"}),
        (r"[lx].(q|k)_proj", {"l.q_proj", "x_q_proj"}),
        (r"^l\.\w+", {"l.q_proj"}),
        ("q_proj$", {"l.q_proj", "q_proj"}),
        ("q_pro", set()),
    ],
)
def test_patterns_match_as_in_peft(pattern: str, names: set[str]) -> None:
    from peft.utils.other import get_pattern_key

    asked = ["l.q_proj", "x_q_proj", "q_proj"]
    assert set(match_patterns({pattern: 1.0}, asked, "x")) == names
    assert {n for n in asked if get_pattern_key([pattern], n) == pattern} == names


def test_the_first_pattern_counts() -> None:
    assert match_patterns({"proj": 0, "a.proj": 1, ".*proj": 2}, ["a.proj"], "x") == {"a.proj": 0}


def test_too_many_patterns() -> None:
    names = [f"m{i}" for i in range(5000)]
    patterns = dict.fromkeys(names, 1.0)
    one_line(lambda: match_patterns(patterns, names, "x"), "5,000 patterns for 5,000 modules")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of 240 kB of a layer of 3.6 GB."""
    made = []
    for seed in range(2):
        draw = torch.Generator().manual_seed(seed)
        a, b = torch.randn(1, 30_000, generator=draw), torch.randn(30_000, 1, generator=draw)
        made.append(tmp_path_factory.mktemp("wide") / str(seed))
        write_peft(LowRankUpdate({"m": a}, {"m": b}), made[-1])
    return made


@pytest.mark.parametrize("name", sorted(MERGES))
def test_merges_make_no_dense_matrix_beyond_a_bound(
    name: str, wide: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LowRankUpdate, "delta", lambda *_: pytest.fail("dense"))
    updates = [read_peft(path) for path in wide]
    if name in ("ties", "dare"):
        one_line(lambda: MERGES[name](updates), r"\[30000, 30000\], a dense ΔW of 900,000,000")
    else:
        assert MERGES[name](updates).shape("m") == (30_000, 30_000)


def test_an_audit_makes_no_dense_matrix_beyond_a_bound(
    wide: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LowRankUpdate, "delta", lambda *_: pytest.fail("dense"))
    audit = audit_composition({path.name: path for path in wide})
    texts = {merge.merge: merge.text for merge in audit.merges}
    assert texts["ties"].startswith("does not apply: m is [30000, 30000]")
    assert "equal to the weighted sum" in texts["exact"]


@pytest.mark.parametrize("name", sorted(MERGES))
@pytest.mark.parametrize("weight", [1e38, -1e308, float("nan"), float("inf")])
def test_weights_beyond_float32(name: str, weight: float, adapter_dirs: list[Path]) -> None:
    updates = [read_peft(path) for path in adapter_dirs]
    one_line(lambda: MERGES[name](updates, [weight, 1.0]), f"weight 1 is .*{LARGEST_WEIGHT:,}")


@pytest.mark.parametrize("name", sorted(MERGES))
def test_no_merge_is_infinite(name: str) -> None:
    """The largest adapters and weights that are allowed."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 8, generator=draw), torch.randn(8, 2, generator=draw)
    large = LowRankUpdate({"m": a * 1e14}, {"m": b * 1e14})
    large.check_finite("x")
    try:
        merged = MERGES[name]([large, large], [LARGEST_WEIGHT] * 2)
    except InputError as error:
        assert "not finite" in str(error)  # noqa: PT017
    else:
        merged.check_finite("x")
        assert merged.delta("m").isfinite().all()


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    update = LowRankUpdate({"m": torch.full((1, 2), 1e38)}, {"m": torch.full((2, 1), 1e38)})
    one_line(lambda: write_peft(update, tmp_path / "out"), "not finite")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_an_adapter_that_changes_nothing(side: str, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({k: t * (side not in k) for k, t in load_file(file).items()}, file)
    one_line(lambda: read_peft(adapter), "changes nothing, all ΔW are 0; was it trained?")


def test_a_scaling_that_underflows_changes_nothing(adapter: Path) -> None:
    config, file = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 1e-30}))
    save_file({k: t * 1e-20 for k, t in load_file(file).items()}, file)
    one_line(lambda: read_peft(adapter), "changes nothing")


@pytest.mark.parametrize(
    ("trained_on", "base", "says"),
    [
        ("org/Some-Base", "Some-Base", None),
        ("org/Some-Base", "other/some-base", None),
        ("org/Some-Base", "org/Other", "was trained on org/Some-Base, the base given is org/Other"),
        ("unsloth/some-base-bnb-4bit", "org/Some-Base", "quantized weights of this base"),
        ("unsloth/some-base-unsloth-bnb-4bit", "org/Some-Base", "quantized weights of this base"),
        ("unsloth/some-base-bnb-4bit", "org/Some-Base-bnb-4bit", None),
        ("a\x1b[31m\nb", "org/Other", r"was trained on a\\x1b\[31m b,"),
        ("", "org/Other", None),
        (None, "org/Other", None),
    ],
)
def test_a_note_on_another_base(
    trained_on: str | None,
    base: str,
    says: str | None,
    adapter: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = adapter / "adapter_config.json"
    content = {**json.loads(config.read_text()), "base_model_name_or_path": trained_on}
    config.write_text(json.dumps(content))
    note_base(adapter, base)
    note_base(adapter, base)
    found = capsys.readouterr().err
    if says is None:
        assert not found
    else:
        import re

        assert found.count("\n") == 1
        assert found.startswith("caliport: note: ")
        assert re.search(says, found)


def test_a_4_bit_copy_is_the_same_base(adapter_dirs: list[Path], tmp_path: Path) -> None:
    made = []
    for path, name in zip(adapter_dirs, ("org/Base", "unsloth/base-bnb-4bit"), strict=True):
        made.append(shutil.copytree(path, tmp_path / path.name))
        config = made[-1] / "adapter_config.json"
        content = {**json.loads(config.read_text()), "base_model_name_or_path": name}
        config.write_text(json.dumps(content))
    check_same_base(made)


def test_a_merge_says_which_flag_chooses_another(base_dir: Path, tmp_path: Path) -> None:
    updates = [
        LowRankUpdate({n: torch.ones(1, 2)}, {n: torch.ones(2, 1)}) for n in ("one", "other")
    ]
    one_line(lambda: MERGES["linear"](updates), "--method exact, or merge: exact in a recipe")


def test_sparse_files_are_bounded(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_files, "_MOST_BYTES", 1000)
    one_line(lambda: read_peft(adapter), "bytes, expected at most 1,000")
