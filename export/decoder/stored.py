"""A decoder's weights as they ship, made one matrix at a time and kept in files.

The checkpoint is memory-mapped and closed again for every parameter, ΔW is added in float32 and the
sum is quantized in slices of rows, so peak memory depends on the largest matrix only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from caliport.core.errors import InputError
from caliport.core.model_files.base_files import tensors_of
from caliport.core.model_files.gguf_base import as_directory
from caliport.core.progress import at
from caliport.export.decoder.fold import Folded
from caliport.export.quantization.choices import GROUP_SIZE, Form
from caliport.export.quantization.integers import integers
from caliport.export.quantization.tensors import KnownIntegers, known_owners

if TYPE_CHECKING:
    from threading import Event

    from transformers import PreTrainedModel

    from caliport.calibrate.adapter import Adapter


Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Stored:
    """One tensor in its own file, little-endian, in C order.

    Attributes:
        path: The file.
        shape: Shape of the tensor in the file. 4-bit values are packed two in a byte, the first in
            the low half, offset by 8, so their last dimension is half as long.
        dtype: Type of the tensor in the file.
        sha256: Of the bytes.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    sha256: bytes

    def tensor(self) -> Tensor:
        """The tensor, memory-mapped from its file."""
        count = 1
        for size in self.shape:
            count *= size
        found = torch.from_file(str(self.path), size=count, dtype=self.dtype)
        return found.view(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return self.path.stat().st_size


class Weights:
    """The stored weights of one decoder.

    Keys are parameter names; a quantized parameter has ``name.data`` and ``name.scale`` instead.
    Equal contents share one file.

    Attributes:
        nbytes: Total size of all files in bytes.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stored: dict[str, Stored] = {}
        self._files: dict[bytes, Path] = {}
        self.nbytes = 0
        directory.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, name: str) -> Stored:
        return self._stored[name]

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def items(self) -> list[tuple[str, Stored]]:
        """Pairs of name and stored tensor."""
        return list(self._stored.items())

    def put(self, name: str, parts: Iterator[Tensor] | list[Tensor], rows: int) -> None:
        """Store a tensor given as slices along its first dimension, of ``rows`` in total."""
        path = self.directory / f"{len(self._stored)}.bin"
        digest = hashlib.sha256()
        shape: tuple[int, ...] = ()
        dtype = torch.float32
        with path.open("wb") as stream:
            for part in parts:
                # numpy has no bfloat16, so the bytes are written as integers.
                data = part.contiguous().view(-1).view(torch.uint8).numpy().data
                stream.write(data)
                digest.update(data)
                shape, dtype = (rows, *part.shape[1:]), part.dtype
        self._keep(name, path, shape, dtype, digest.digest())

    def _keep(
        self, name: str, path: Path, shape: tuple[int, ...], dtype: torch.dtype, digest: bytes
    ) -> None:
        first = self._files.setdefault(digest, path)
        if first != path:
            path.unlink()
        else:
            self.nbytes += path.stat().st_size
        self._stored[name] = Stored(first, shape, dtype, digest)


def store(
    source: str | Path,
    shell: PreTrainedModel,
    forms: Mapping[str, Form],
    adapter: Adapter | None,
    directory: Path,
    tied: Mapping[str, str],
    known: KnownIntegers | None = None,
    stop: Event | None = None,
) -> Weights:
    """Fold, quantize and store every parameter of a decoder.

    Args:
        source: A Hugging Face directory or hub name.
        shell: The decoder on the ``meta`` device, for names and shapes.
        forms: How each linear layer and embedding ships, by module name
            (``caliport.export.quantization.tensors.plan``); the other parameters ship in float32.
        adapter: What to add or replace, with the decoder's names; None for nothing.
        directory: Directory for the files.
        tied: For each tied parameter, the name that it is stored by.
        known: Integers to take in place of quantizing, and tuned parameters; a tied embedding
            takes the head's integers.
        stop: Event that stops storing early.

    Raises:
        InputError: A checkpoint that lacks a parameter, or has one of another shape or with weights
            that are NaN or infinite.
    """
    weights = Weights(directory)
    replaced = {} if known is None else known.replaced
    with reading(source) as read:
        modules = list(shell.named_modules())
        owners = known_owners(shell, forms, known)
        for index, (name, module) in enumerate(modules):
            for key, parameter in module.named_parameters(recurse=False):
                if stop is not None and stop.is_set():
                    return weights
                at(f"quantizing {name}", index, len(modules))
                full = f"{name}.{key}" if name else key
                value = read(tied.get(full, full))
                if value.shape != parameter.shape:
                    raise InputError(
                        f"{source}: {full} is {list(value.shape)}, the model of config.json has "
                        f"{list(parameter.shape)}"
                    )
                form = forms.get(name) if key == "weight" else None
                if full in replaced:
                    _store_one(weights, full, Folded(replaced[full]), None)
                    continue
                if known is not None and key == "weight" and name in owners:
                    _store_known(weights, full, known.parts(owners[name]), value.shape)
                    continue
                _store_one(weights, full, Folded.of(adapter, module, full, value), form)
    return weights


def can_stream(source: str | Path, shell: PreTrainedModel, tied: Mapping[str, str]) -> bool:
    """Whether a checkpoint is local and has every parameter under the name it is stored by."""
    directory = Path(as_directory(source))
    files = tensors_of(directory) if directory.is_dir() else {}
    return all(tied.get(name, name) in files for name, _ in shell.named_parameters())


def put_matrix(weights: Weights, name: str, value: Tensor, form: Form | None) -> int:
    """Store a matrix in a form (None for float32) and return the bytes this adds.

    Equal contents are stored once, so storing the same matrix again adds none.
    """
    before = weights.nbytes
    _store_one(weights, name, Folded(value), form)
    return weights.nbytes - before


def _store_one(weights: Weights, name: str, folded: Folded, form: Form | None) -> None:
    value = folded.value

    def rows(start: int, stop: int) -> Tensor:
        part = folded.rows(start, stop)
        if not part.sum().isfinite():
            raise InputError(f"{name}: found NaN or infinite weights, expected finite ones")
        return part

    count = value.shape[0] if value.dim() else 1
    if form is None:
        step = max(1, (1 << 24) // max(1, value[:1].numel()))
        slices = (rows(i, i + step) for i in range(0, count, step))
        weights.put(name, slices if value.dim() else [rows(0, 1)], count)
        return
    # One allocation: many small tensors that live on would fragment the memory that threads free.
    groups = value.shape[1] // GROUP_SIZE if form.endswith("int4") else 1
    scales = torch.empty(
        count, groups, dtype=torch.bfloat16 if form.endswith("int4") else torch.float32
    )

    def data() -> Iterator[Tensor]:
        done = 0
        for part, scale in integers(rows, count, value.shape[1], form):
            scales[done : done + len(scale)] = scale
            done += len(scale)
            yield part

    weights.put(f"{name}.data", data(), count)
    weights.put(f"{name}.scale", [scales], count)


def _store_known(
    weights: Weights, name: str, parts: tuple[Tensor, Tensor], shape: tuple[int, ...]
) -> None:
    data, scales = parts
    rows, width = shape
    expected = [(rows, width // 2), (rows, width // GROUP_SIZE)]
    if [tuple(data.shape), tuple(scales.shape)] != expected:
        raise InputError(f"{name}: {list(data.shape)} integers, expected {list(expected[0])}")
    weights.put(f"{name}.data", [data], rows)
    weights.put(f"{name}.scale", [scales.bfloat16()], rows)


@contextmanager
def reading(source: str | Path) -> Iterator[Read]:
    """Yield a function that reads a parameter by name, without loading all of a local checkpoint.

    A checkpoint whose tensors do not have the parameters' names (an older layout that transformers
    converts while loading), or one given by hub name, is loaded whole.
    """
    directory = Path(as_directory(source))
    files = tensors_of(directory) if directory.is_dir() else {}
    if not files:
        yield _loaded(source)
        return
    fallback: list[Read] = []

    def read(name: str) -> Tensor:
        if name not in files:
            if not fallback:
                fallback.append(_loaded(source))
            return fallback[0](name)
        from safetensors import safe_open

        # Opened anew each time: closing the mapping releases the pages that were read.
        with safe_open(files[name].file, framework="pt") as opened:
            return opened.get_tensor(name)

    yield read


def _loaded(source: str | Path) -> Read:
    from caliport.core.checkpoints import load_base

    parameters = dict(load_base(source).named_parameters(remove_duplicate=False))

    def read(name: str) -> Tensor:
        if name not in parameters:
            raise InputError(f"{source}: has no {name}, which the model of config.json needs")
        return parameters[name].detach()

    return read


def describe(forms: Mapping[str, Form]) -> dict[str, Any]:
    """Number of layers that ship in each form, for a manifest."""
    counts: dict[str, int] = {}
    for form in forms.values():
        counts[form] = counts.get(form, 0) + 1
    return dict(sorted(counts.items()))
