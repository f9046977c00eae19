"""What an export will need is said first, and a machine without it is told so in one line."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from commands import ENVIRONMENT
from conftest import random_adapter
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

from caliport.core.errors import InputError
from caliport.core.machine import available_memory
from caliport.export import preflight
from caliport.export.calibrated.requests import integers_of
from caliport.export.decoder import shipped
from caliport.export.make import make
from caliport.export.preflight import Needs, needs
from caliport.export.quantization.choices import Goal, Quantization
from caliport.export.quantization.text import CalibrationText
from caliport.export.request import Bundle, Request
from caliport.export.runtime import names
from tests.exports import text_of
from tests.forking import forked
from tests.sampling import thorough

INT4 = Quantization("int4")


def config(**settings: object) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": 8192,
            "hidden_size": 320,
            "intermediate_size": 704,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "max_position_embeddings": 64,
            **settings,
        }
    )


def checkpoint(directory: Path, **settings: object) -> Path:
    """A Llama of 4.6 million values, or 7.2 untied, and a tokenizer of a few tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(**settings))
    for parameter in model.parameters():  # else the norms are equal, and stored once
        if parameter.dim() == 1:
            parameter.data.normal_()
    model.save_pretrained(directory)
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(f"{directory}/tokenizer.json")
    return directory


def huge_base(directory: Path) -> Path:
    """A checkpoint whose embedding, like all its weights, is a hole in a sparse file."""
    directory.mkdir()
    wide = config(
        vocab_size=2**24,
        hidden_size=6400,
        num_hidden_layers=1,
        num_attention_heads=64,
        num_key_value_heads=64,
        tie_word_embeddings=True,
    )
    wide.save_pretrained(directory)
    with torch.device("meta"):
        tensors = dict(LlamaForCausalLM(wide).named_parameters())
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        shape = list(tensor.shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return directory


def test_what_memory_cannot_hold_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    """400 GB, which no machine here could read before the test is given up."""
    huge_base(tmp_path / "base")
    done = forked("export", "--base", "base", "--runtime", "onnx", "--out", "art", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "base: onnx fp32 needs about " in done.stderr
    assert "GB of memory, " in done.stderr
    assert "--no-preflight" in done.stderr
    assert "art: needs about " in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_no_disk(tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_disk", lambda out: 100_000)
    given = Request(base_dir, "executorch", INT4), tmp_path / "art"
    with pytest.raises(InputError, match=r"needs about 0 MB of disk, 0 MB are free at .*; free"):
        preflight.preflight(*given)
    assert preflight.preflight(*given, refuse=False) is not None


def test_free_disk_is_that_of_the_nearest_directory(tmp_path: Path) -> None:
    assert preflight.free_disk(tmp_path / "a" / "b") > 0


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("untied"))


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Takes the bytes that an export has on disk when its weights are about to go."""
    found: list[int] = []

    class Watched(TemporaryDirectory):
        def cleanup(self) -> None:
            found.append(_bytes(Path(self.name).parent))
            super().cleanup()

    monkeypatch.setattr(shipped, "TemporaryDirectory", Watched)
    return found


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _check(found: Needs | None, out: Path, peaks: list[int]) -> None:
    assert found is not None
    for estimate, real in ((found.artifact, _bytes(out)), (found.disk, peaks[-1])):
        assert abs(estimate / real - 1) < 0.05, (estimate, real)


def test_calibration_and_a_goal_are_counted(base_dir: Path, tmp_path: Path) -> None:
    text = text_of(tmp_path, 8, 256)
    how = Quantization("int4", quantizer="gptq")
    plain = needs(Request(base_dir, "onnx", INT4, 64))
    calibrated = needs(Request(base_dir, "onnx", how, 64, text=text))
    goal = needs(Request(base_dir, "onnx", how, 64, text=text, goal=Goal(target_kl=0.1)))
    assert plain is not None
    assert calibrated is not None
    assert goal is not None
    assert plain.artifact == calibrated.artifact == goal.artifact
    integers = sum(path.stat().st_size for path in _integers(base_dir, text, tmp_path))
    states = 2 * 4 * 256 * 64  # hidden states of 64 values after a layer, beside those before it
    assert calibrated.disk - plain.disk == pytest.approx(integers + states, rel=0.05)
    assert plain.memory < calibrated.memory < goal.memory
    assert plain.seconds < calibrated.seconds < goal.seconds


def _integers(base: Path, text: CalibrationText, place: Path) -> list[Path]:
    how = Quantization("int4", quantizer="gptq")
    source = integers_of(Request(base, "onnx", how, 64, text=text), place / "integers")
    assert source is not None
    source(shipped.planned(base, None, how))
    return list((place / "integers").glob("*.safetensors"))


LAYERS = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")


FORMS = {
    "fp32": ("tied", Quantization("fp32")),
    "int8": ("tied", Quantization("int8")),
    "int4": ("tied", INT4),
    "int4 and 8": ("tied", Quantization("int4", LAYERS, 8)),
    "int8 untied": ("untied", Quantization("int8")),
    "int4 untied": ("untied", INT4),
}


def _cases() -> list[Any]:
    """Lowering to ExecuTorch takes its time: two of its forms in every run."""
    every = [("onnx", name) for name in FORMS]
    every += [("executorch", "fp32"), ("executorch", "int4 and 8")]
    return [
        thorough(*case, runtime, name=f"{runtime} {form}", left_out=(runtime, form) not in every)
        for form, case in FORMS.items()
        for runtime in names()
    ]


@pytest.mark.parametrize(("base", "how", "runtime"), _cases())
def test_disk_is_that_of_a_real_export(
    base: str,
    how: Quantization,
    runtime: str,
    tmp_path: Path,
    peaks: list[int],
    request: pytest.FixtureRequest,
) -> None:
    wanted = Request(request.getfixturevalue(base), runtime, how)
    make(wanted, tmp_path / "art")
    _check(needs(wanted), tmp_path / "art", peaks)


@pytest.mark.parametrize("runtime", ["onnx", thorough("executorch")])
def test_disk_of_a_bundle(runtime: str, tied: Path, tmp_path: Path, peaks: list[int]) -> None:
    """Compositions lie beside the base, in as many bits as the runtime has them."""
    paths = [random_adapter(tied, tmp_path / f"{i}", i, rank=16) for i in range(2)]
    bundle = Bundle({f"c{i}": path for i, path in enumerate(paths)})
    wanted = Request(tied, runtime, INT4, bundle=bundle)
    make(wanted, tmp_path / "art")
    _check(needs(wanted), tmp_path / "art", peaks)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ({"target_modules": ["lm_head", "q_proj"]}, INT4),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, Quantization("int8")),
    ],
    ids=["head", "embedding"],
)
def test_disk_where_an_adapter_unties_the_head(
    kind: dict[str, Any], how: Quantization, tied: Path, tmp_path: Path, peaks: list[int]
) -> None:
    adapter = random_adapter(tied, tmp_path / "a", 1, ensure_weight_tying=False, **kind)
    wanted = Request(tied, "onnx", how, adapter=adapter)
    make(wanted, tmp_path / "art")
    _check(needs(wanted), tmp_path / "art", peaks)
    without, found = needs(Request(tied, "onnx", how)), needs(wanted)
    assert without is not None
    assert found is not None
    values = 8192 * 320
    assert found.memory >= without.memory + (4 * values if "embed" in str(kind) else 0)
    assert found.disk > without.disk + values / 2


def test_what_is_no_checkpoint_is_left_to_what_loads_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for base in (tmp_path / "empty", tmp_path / "gone", "nobody/nothing", "no name at all"):
        assert preflight.preflight(Request(base, "onnx", INT4), tmp_path / "art") is None


def write(place: Path, **files: object) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (place / name.replace("__", ".")).write_text(f"{content}\n")


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"": "max", "a": "max", "a/b": "max"}, None),
        ({"": None, "a": 5000, "a/b": "max"}, 4500),
        ({"": 9000, "a": 5000, "a/b": 2000}, 1500),
        ({"": None, "a": None, "a/b": 300}, 0),
        ({"": 2500, "a": None, "a/b": None}, 2000),
    ],
    ids=["none", "around", "tightest", "full", "container"],
)
def test_memory_of_the_control_group(
    tmp_path: Path, limits: dict[str, object], left: int | None
) -> None:
    """Version 2: 700 bytes used, 200 of them files that can be dropped."""
    write(tmp_path / "proc/self", cgroup="0::/a/b")
    for group, limit in limits.items():
        if limit is not None:
            stat = "anon 500\ninactive_file 200"
            write(tmp_path / "v2" / group, memory__max=limit, memory__current=700)
            write(tmp_path / "v2" / group, memory__stat=stat)
    found = available_memory(tmp_path / "proc", tmp_path / "v2")
    assert found == left if left is not None else found > 10**8


def test_memory_of_the_older_control_group(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", cgroup="5:cpu,cpuacct:/x\n4:memory:/x\n0::/")
    names = {"memory__limit_in_bytes": 5000, "memory__usage_in_bytes": 700}
    write(tmp_path / "v1/memory/x", **names, memory__stat="total_inactive_file 200")
    assert available_memory(tmp_path / "proc", tmp_path / "v1") == 4500


def test_without_proc_the_machines_memory_counts(tmp_path: Path) -> None:
    assert available_memory(tmp_path) > 10**8


# Not ru_maxrss, which a child inherits from the process that forked it.
_PEAK = """
import atexit, sys
from pathlib import Path
from caliport.export.api import export
atexit.register(lambda: print(Path("/proc/self/status").read_text()))
base, runtime, precision = sys.argv[1:]
export(base, "art", runtime=runtime, precision=precision)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Most of the memory that is not the libraries' is its embedding's 100 MB."""
    return checkpoint(tmp_path_factory.mktemp("wide"), vocab_size=80_000, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("runtime", "precision"),
    [("onnx", "fp32"), thorough("executorch", "fp32"), ("executorch", "int4")],
)
def test_the_process_needs_no_more_memory_than_is_said(
    runtime: str, precision: str, wide: Path, tmp_path: Path
) -> None:
    """And not much less: the estimate is within a factor of 1.5."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, wide, runtime, precision],
        cwd=tmp_path,
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    peak = 1024 * int(done.stdout.split("VmHWM:")[1].split()[0])
    found = needs(Request(wide, runtime, Quantization(precision)))
    assert found is not None
    assert peak < found.memory < 1.5 * peak
