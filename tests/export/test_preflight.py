"""What an export will need is said first, and a machine without it is told so in one line."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ENVIRONMENT, caliport
from torch import nn

from caliport_core.checkpoints import load_base
from caliport_core.errors import InputError
from export import preflight
from export.preflight import Shape, available_memory, needs, read_shape


def huge_base(directory: Path, rows: int, columns: int) -> Path:
    """A checkpoint whose one matrix is a hole in a sparse file."""
    directory.mkdir()
    size = 4 * rows * columns
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, size]}
    header = json.dumps({name: tensor}).encode()
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + size)
    (directory / "config.json").write_text(json.dumps({"num_hidden_layers": 1}))
    return directory


def test_what_memory_cannot_hold_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    """400 GB, which no machine here reads in the time that is given."""
    huge_base(tmp_path / "base", 100_000, 1_000_000)
    start = time.monotonic()
    done = caliport("export", "--base", "base", "--runtime", "onnx", "--out", "art", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "base: onnx fp32 needs about 1200.9 GB of memory, " in done.stderr
    assert "--no-preflight" in done.stderr
    assert "art: needs about 1200.9 GB of memory" in done.stdout
    assert time.monotonic() - start < 60
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_no_disk(tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_disk", lambda out: 1_000_000)
    given = (base_dir, None, "executorch", "int4", tmp_path / "art")
    with pytest.raises(InputError, match=r"needs about 20 MB of disk, 1 MB are free at .*; free"):
        preflight.preflight(*given)
    assert preflight.preflight(*given, refuse=False) is not None


def test_free_disk_is_that_of_the_nearest_directory(tmp_path: Path) -> None:
    assert preflight.free_disk(tmp_path / "a" / "b") > 0


def test_values_are_those_of_the_model(base_dir: Path) -> None:
    shape = read_shape(base_dir)
    assert shape is not None
    model = load_base(base_dir)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    embedding = model.get_input_embeddings().weight.numel()
    assert (shape.linear, shape.embedding, shape.layers) == (linear, embedding, 2)
    matrices = [p.numel() for p in model.parameters() if p.dim() == 2]
    assert shape.largest == max(matrices)
    assert shape.other == sum(p.numel() for p in model.parameters()) - sum(matrices)


def test_the_formula() -> None:
    shape = Shape(linear=10**9, embedding=10**8, other=10**5, largest=10**8, layers=16)
    onnx, executorch = (needs(shape, runtime, "int4") for runtime in ("onnx", "executorch"))
    assert onnx.memory == preflight.PROCESS + 3 * 4 * 10**8
    assert executorch.memory == onnx.memory + 3 * 1.01 * 10**8
    assert needs(shape, "onnx", "int4", adapter_bytes=5).memory == onnx.memory + 5
    assert onnx.disk == executorch.disk
    sizes = [needs(shape, "onnx", precision).disk for precision in preflight.BYTES]
    assert sizes[0] > 3 * sizes[1] > 3 * sizes[2]
    assert executorch.seconds > onnx.seconds > preflight.START


def test_what_is_no_checkpoint_is_left_to_what_loads_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for base in (tmp_path / "empty", tmp_path / "gone", "nobody/nothing", "no name at all"):
        assert preflight.preflight(base, None, "onnx", "fp32", tmp_path / "art") is None


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
from caliport.cli import main
atexit.register(lambda: print(Path("/proc/self/status").read_text()))
sys.argv[0] = "caliport"
main()
"""


@pytest.mark.parametrize("runtime", ["onnx", "executorch"])
def test_the_process_needs_no_more_than_is_said(
    runtime: str, base_dir: Path, tmp_path: Path
) -> None:
    """Of a tiny model, all is the constant for Python and its libraries; it is tight, too."""
    flags = ("--base", base_dir, "--runtime", runtime, "--precision", "int4", "--out", "art")
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, "export", *flags],
        cwd=tmp_path,
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    peak = 1024 * int(done.stdout.split("VmHWM:")[1].split()[0])
    assert 0.5 * preflight.PROCESS < peak < preflight.PROCESS
