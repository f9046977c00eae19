"""What an export will need, said before a weight is read: memory, disk and time.

The estimate comes from the headers of the base's safetensors files and its ``config.json``:

    memory  = PROCESS + MATRIX_COPIES · 4 · largest matrix + adapter
              + (ExecuTorch) EMBEDDING_COPIES · embedding as it ships
    disk    = FILES + Σ matrices as they ship + 4 · all other values
    seconds = START + LAYER[runtime] · layers + VALUES[precision] · values

with sizes in bytes. Weights are read and quantized one matrix at a time, so the size of the whole
model is in none but the last two.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from caliport_core.checkpoints import check_safetensors
from caliport_core.errors import InputError

PROCESS = 0.9e9
"""Python and the libraries, bytes."""
MATRIX_COPIES = 3
"""Of the largest matrix in float32: as read, with the adapter, while it is quantized."""
EMBEDDING_COPIES = 3
"""Of the embedding as it ships: ExecuTorch copies constants while it lowers and serializes."""
FILES = 20e6
"""Graph, tokenizer and the other small files, bytes."""
BYTES = {
    "fp32": {"linear": 4.0, "embedding": 4.0},
    "int8": {"linear": 1.01, "embedding": 1.01},
    "int4": {"linear": 0.625, "embedding": 1.01},
}
"""Bytes a value as it ships, scales included."""
START = 12.0
"""Seconds for imports, tokenizer and the smallest graph."""
LAYER = {"executorch": 6.0, "onnx": 0.5}
"""Seconds a decoder layer; measured on two cores of an AMD EPYC."""
VALUES = {"fp32": 5e-9, "int8": 6e-9, "int4": 12e-9}
"""Seconds a value, to read, quantize and write it; the same machine."""

_EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "wpe", "embed_positions", "word_embeddings")
_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Shape:
    """A base's values by kind, as its safetensors headers count them.

    Attributes:
        linear: Values in linear layers, the head included.
        embedding: Values in embeddings.
        other: Values in all else, such as norms and biases.
        largest: Values of the largest matrix.
        layers: Decoder layers.
    """

    linear: int
    embedding: int
    other: int
    largest: int
    layers: int


@dataclass(frozen=True)
class Needs:
    """Peak memory and disk in bytes, and time in seconds; about, not exactly."""

    memory: int
    disk: int
    seconds: float


def preflight(
    base: str | Path,
    adapter: Path | None,
    runtime: str,
    precision: str,
    out: Path,
    *,
    refuse: bool = True,
) -> Needs | None:
    """Print what an export will need and stop if this machine does not have it.

    Args:
        base: A Hugging Face directory or hub name. Where its headers cannot be read from this
            machine's disk, nothing is said and nothing refused: loading it says what is wrong.
        adapter: A PEFT LoRA directory, if there is one.
        runtime: ``executorch`` or ``onnx``.
        precision: ``fp32``, ``int8`` or ``int4``.
        out: Where the artifact will appear.
        refuse: Stop if memory or disk do not suffice.

    Returns:
        What it needs, or None where it cannot be known.

    Raises:
        InputError: Too little memory (that of the machine or of the control group that this
            process is in) or too little disk.
    """
    shape = read_shape(base)
    if shape is None:
        return None
    found = needs(shape, runtime, precision, _adapter_bytes(adapter))
    memory, disk = available_memory(), free_disk(out)
    print(
        f"{out.name}: needs about {_size(found.memory)} of memory ({_size(memory)} available) and "
        f"{_size(found.disk)} of disk ({_size(disk)} free), and takes about {_time(found.seconds)}",
        flush=True,
    )
    for kind, wanted, there, where in (
        ("memory", found.memory, memory, "are available"),
        ("disk", found.disk, disk, f"are free at {out.parent}"),
    ):
        if refuse and wanted > there:
            raise InputError(
                f"{base}: {runtime} {precision} needs about {_size(wanted)} of {kind}, "
                f"{_size(there)} {where}; free some, or go on with --no-preflight"
            )
    return found


def needs(shape: Shape, runtime: str, precision: str, adapter_bytes: int = 0) -> Needs:
    """The estimate that stands at the top of this file."""
    ships = BYTES[precision]
    embedding = ships["embedding"] * shape.embedding
    memory = PROCESS + MATRIX_COPIES * 4 * shape.largest + adapter_bytes
    if runtime == "executorch":
        memory += EMBEDDING_COPIES * embedding
    disk = FILES + ships["linear"] * shape.linear + embedding + 4 * shape.other
    values = shape.linear + shape.embedding + shape.other
    seconds = START + LAYER[runtime] * shape.layers + VALUES[precision] * values
    return Needs(int(memory), int(disk), seconds)


def read_shape(base: str | Path) -> Shape | None:
    """Count a base's values without reading a tensor; None without its files at hand.

    A head that is tied to the embedding counts as a linear layer of its own, since quantizing
    unties it.

    Raises:
        InputError: A truncated weight file.
    """
    directory = _local(base)
    if directory is None:
        return None
    linear = embedding = other = largest = rows = 0
    has_head = False
    for name, shape in _tensors(directory):
        values = math.prod(shape)
        if len(shape) != 2:
            other += values
            continue
        largest = max(largest, values)
        if any(part in _EMBEDDINGS for part in name.split(".")):
            embedding += values
            rows = max(rows, values)
        else:
            linear += values
            has_head |= "head" in name or "embed_out" in name
    if not largest:
        return None
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    return Shape(linear if has_head else linear + rows, embedding, other, largest, int(layers))


def available_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still use: the machine's, or less if a control group says so.

    Args:
        proc: Of the kernel, where ``self/cgroup`` names the groups.
        groups: Where the control groups are mounted, version 1 or 2.
    """
    import psutil

    left = int(psutil.virtual_memory().available)
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return left
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            left = min(left, _room(groups, path, "memory.max", "memory.current", "inactive_file"))
        elif "memory" in kinds.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            left = min(left, _room(groups / "memory", path, *names))
    return max(left, 0)


def _room(root: Path, path: str, limit: str, usage: str, cache: str) -> int:
    """What the tightest of a control group and those around it leaves free.

    Pages of files that were not used lately count as used but can be given back at once. Where a
    container mounts its own group as the root, its path is not below it, but the root's files are.
    """
    left = _UNLIMITED
    place = root / path.strip("/")
    for group in (place, *place.parents):
        if not group.is_relative_to(root):
            break
        try:
            most = (group / limit).read_text().strip()
            used = int((group / usage).read_text())
            facts = (line.split() for line in (group / "memory.stat").read_text().splitlines())
            back = next((int(value) for name, value in facts if name == cache), 0)
        except (OSError, ValueError):
            continue
        if most != "max":
            left = min(left, int(most) - used + back)
    return left


def free_disk(out: Path) -> int:
    """Free bytes where ``out`` will be written."""
    out = out.absolute()
    return shutil.disk_usage(next(p for p in (out, *out.parents) if p.is_dir())).free


def _local(base: str | Path) -> Path | None:
    """The directory of a base: itself, or a hub name's copy on this machine."""
    if Path(base).is_dir():
        return Path(base) if (Path(base) / "config.json").is_file() else None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(str(base), "config.json")
    except ValueError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _tensors(directory: Path) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes from the headers of the files that transformers would load."""
    from safetensors import safe_open

    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [directory / name for name in sorted(set(weight_map.values()))]
    else:
        one = directory / "model.safetensors"
        files = [one] if one.is_file() else sorted(directory.glob("*.safetensors"))
    for file in files:
        check_safetensors(file)
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  no mapping: it cannot be iterated
                yield name, tensors.get_slice(name).get_shape()


def _adapter_bytes(adapter: Path | None) -> int:
    """An adapter is held as float32 whole; its files are at most half as large."""
    files = adapter.glob("*.safetensors") if adapter is not None else []
    return 2 * sum(file.stat().st_size for file in files)


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{max(size, 0) / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(10, 10 * round(seconds / 10))} seconds"
    return f"{round(seconds / 60)} minutes"
