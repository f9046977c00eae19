"""What an export will need, said before a weight is read: memory, disk and time.

The estimate comes from the decoder that ``config.json`` describes, built without weights, and from
the headers of the safetensors files:

    artifact = every matrix as its runtime stores it + graph + tokenizer + adapters beside the base
    disk     = artifact + all weights as they ship, which lie in files until the program is written
    memory   = adapters + the larger of
               READING + TOKENIZER · tokenizer + the largest matrix as read + the largest ΔW
               LOWERING[runtime] + TOKENIZER · tokenizer
                   + the largest matrix as it ships (ONNX), or
                   + CONSTANTS[precision] · embeddings as they ship (ExecuTorch)
             + further methods · (their key-value cache + METHOD · layers)
    seconds  = START[runtime] + LAYER[runtime] · layers + VALUE[precision] · values

with sizes in bytes. Weights are read, quantized and written one matrix at a time, so the size of
the whole model is not in the memory. A checkpoint on a hub, or one whose tensors do not have the
parameters' names, is loaded as a whole, in float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from caliport.core.checkpoints import check_safetensors, load_config
from caliport.core.errors import InputError
from caliport.core.machine import available_memory, free_disk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from caliport.export.quantization.choices import Form, Quantization

READING = 0.75e9
"""Python, the libraries, slices of matrices, and a skeleton that is traced meanwhile; bytes."""
LOWERING = {"executorch": 0.9e9, "onnx": 0.63e9}
"""Python and the libraries with a graph, while it is lowered and written."""
TOKENIZER = 13
"""Bytes in memory for one of ``tokenizer.json``."""
CONSTANTS = {"fp32": 2.3, "int8": 1.5, "int4": 1.5}
"""Copies of the embeddings: ExecuTorch copies constants while it emits a program."""
GRAPH = 18_000
"""Bytes of the graph and of gaps between weights, for each layer of a method and once more."""
METHOD = 3e6
"""Bytes in memory for each layer of every further method, until all are written."""
START = {"executorch": 20.0, "onnx": 12.0}
"""Seconds for imports, tokenizer, tracing and lowering; as all seconds, on two EPYC cores."""
LAYER = {"executorch": 0.5, "onnx": 0.1}
"""Seconds a layer of a method, to repeat it."""
VALUE = {"fp32": 20e-9, "int8": 10e-9, "int4": 8e-9}
"""Seconds a value, to read, quantize, write and hash it."""


@dataclass(frozen=True)
class Needs:
    """What an export needs; about, not exactly.

    Attributes:
        memory: Peak, bytes.
        disk: Peak, bytes.
        artifact: Those of the disk that stay.
        seconds: Wall time.
    """

    memory: int
    disk: int
    artifact: int
    seconds: float


@dataclass(frozen=True)
class Part:
    """A parameter as it ships.

    Attributes:
        shape: Its sizes; [out, in] of a linear layer, [rows, length] of an embedding.
        form: How it is quantized; None for float32.
        is_lookup: An embedding.
        is_tied: An embedding with the very numbers of the head.
    """

    shape: tuple[int, ...]
    form: Form | None
    is_lookup: bool = False
    is_tied: bool = False

    @property
    def values(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    def stored(self) -> int:
        """Bytes of its files while the program is made (``caliport.export.decoder.stored``)."""
        return 0 if self.is_tied else self._data() + self._scales(2)

    def shipped(self, runtime: str) -> int:
        """Bytes in the program that it adds to those of the other parts."""
        if self.form is not None and runtime == "onnx":
            return self._in_nodes(self.form)
        # ExecuTorch reads an embedding's scales, and a float embedding, from constants of its own.
        shared = self.is_tied and (self.form is not None or runtime == "onnx")
        return (0 if shared else self._data()) + self._scales(4 if self.is_lookup else 2)

    def emitted(self) -> int:
        """Bytes among the constants that ExecuTorch copies: an embedding's."""
        return self._data() + self._scales(4) if self.is_lookup else 0

    def _data(self) -> int:
        bits = 32 if self.form is None else 8 if self.form.endswith("int8") else 4
        return self.values * bits // 8

    def _scales(self, size: int) -> int:
        """Bytes of scales, where those of a group take ``size`` and those of a row 4."""
        from caliport.export.quantization.choices import GROUP_SIZE

        if self.form is None:
            return 0
        return 4 * self.shape[0] if self.form.endswith("int8") else size * self.values // GROUP_SIZE

    def _in_nodes(self, form: Form) -> int:
        """Bytes as ONNX Runtime's operators take them."""
        from caliport.export.onnx.layouts import lookup_layout, product_layout

        rows, columns = self.shape
        product = product_layout(rows, columns, "int8" if form.endswith("int8") else "int4")
        layout = product
        if self.is_lookup:
            layout = lookup_layout(rows, columns, form, product if self.is_tied else None)
        size = math.prod(layout.data_shape) + 4 * math.prod(layout.scale_shape)
        if self.is_tied and layout.scale_shape == product.scale_shape:
            return 0 if math.prod(product.data_shape) == math.prod(layout.data_shape) else size
        return size


def preflight(
    base: str | Path,
    adapters: Sequence[Path],
    runtime: str,
    how: Quantization,
    out: Path,
    *,
    refuse: bool = True,
    context: int | None = None,
    shared: Sequence[Path] | None = None,
) -> Needs | None:
    """Print what an export will need and stop if this machine does not have it.

    Args:
        base: A Hugging Face directory or hub name. Where its headers cannot be read from this
            machine's disk, nothing is said and nothing refused: loading it says what is wrong.
        adapters: PEFT LoRA directories: the one that is folded in, or a bundle's compositions.
        runtime: ``executorch`` or ``onnx``.
        how: How the base is quantized.
        out: Where the artifact will appear.
        refuse: Stop if memory or disk do not suffice.
        context: Tokens of the cache; default the base's own maximum.
        shared: Of a bundle: the adapters that its compositions stand on, if any. None: no bundle.

    Returns:
        What it needs, or None where it cannot be known.

    Raises:
        InputError: Too little memory (that of the machine or of the control group that this
            process is in) or too little disk; a base or layers that cannot be exported at all.
    """
    found = needs(base, adapters, runtime, how, context, shared)
    if found is None:
        return None
    memory, disk = available_memory(), free_disk(out)
    print(
        f"{out.name}: needs about {_size(found.memory)} of memory ({_size(memory)} available) and "
        f"{_size(found.disk)} of disk ({_size(disk)} free), {_size(found.artifact)} of which stay, "
        f"and takes about {_time(found.seconds)}",
        flush=True,
    )
    for kind, wanted, there, where in (
        ("memory", found.memory, memory, "are available"),
        ("disk", found.disk, disk, f"are free at {out.parent}"),
    ):
        if refuse and wanted > there:
            raise InputError(
                f"{base}: {runtime} {how.precision} needs about {_size(wanted)} of {kind}, "
                f"{_size(there)} {where}; free some, or go on with --no-preflight"
            )
    return found


def needs(
    base: str | Path,
    adapters: Sequence[Path],
    runtime: str,
    how: Quantization,
    context: int | None = None,
    shared: Sequence[Path] | None = None,
) -> Needs | None:
    """The estimate that stands at the top of this file; arguments are ``preflight``'s."""
    from caliport.export.decoder.skeleton import empty
    from caliport.export.quantization.tensors import plan

    directory = _local(base)
    read = {} if directory is None else {n: (t, s) for n, t, s in _headers(directory)}
    if directory is None or not read:
        return None
    whole = empty(load_config(directory)[0], buffers=False)
    forms = plan(whole, how.precision, how.int8_layers, how.embedding_bits)
    parts = parts_of(whole, forms)
    beside = _Beside.of(adapters, shared, runtime, how.precision)
    depth = int(whole.config.get_text_config().num_hidden_layers)
    layers = depth * beside.methods
    tokenizer = sum(file.stat().st_size for file in directory.glob("tokenizer*.json"))

    artifact = sum(part.shipped(runtime) for part in parts) + beside.shipped + tokenizer
    artifact += GRAPH * (layers + 1)
    artifact += _rotary_tables(whole, context) if runtime == "onnx" else 0
    stored = sum(part.stored() for part in parts)
    stored += beside.shipped if runtime == "executorch" else 0

    values = sum(part.values for part in parts if not part.is_tied)
    reading = (
        READING
        + TOKENIZER * tokenizer
        + max(_BYTES.get(t, 4) * math.prod(s) for t, s in read.values())
    )
    reading += 4 * beside.largest
    if not Path(base).is_dir() or not _has_names(whole, read):
        reading += 4 * values
    if runtime == "onnx":
        largest = float(max(part.shipped(runtime) for part in parts))
    else:
        largest = CONSTANTS[how.precision] * sum(part.emitted() for part in parts)
    memory = max(reading, LOWERING[runtime] + TOKENIZER * tokenizer + largest) + beside.held
    cache = _cache(whole, context, how.cache_bits)
    memory += (beside.methods - 1) * (cache + METHOD * depth)
    seconds = START[runtime] + LAYER[runtime] * layers + VALUE[how.precision] * values
    return Needs(int(memory), artifact + stored, artifact, seconds)


def parts_of(whole: PreTrainedModel, forms: Mapping[str, Form]) -> list[Part]:
    """All parameters of a decoder, a tied embedding beside its head."""
    from torch import nn

    heads = {id(m.weight): n for n, m in whole.named_modules() if isinstance(m, nn.Linear)}
    found = []
    for name, module in whole.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            form = forms.get(name) if key == "weight" else None
            lookup = isinstance(module, nn.Embedding)
            head = heads.get(id(parameter)) if lookup else None
            same = head is not None and (form or "").removeprefix("rows ") == forms.get(head, "")
            found.append(Part(tuple(parameter.shape), form, lookup, same))
    return found


@dataclass(frozen=True)
class _Beside:
    """What the adapters add.

    Attributes:
        methods: Of the program.
        held: Bytes in memory.
        shipped: Bytes in the artifact.
        largest: Values of the largest ΔW that is folded in.
    """

    methods: int
    held: int
    shipped: int
    largest: int

    @classmethod
    def of(
        cls, adapters: Sequence[Path], shared: Sequence[Path] | None, runtime: str, precision: str
    ) -> _Beside:
        shapes = [{n: s for n, _, s in _headers(path)} for path in (*adapters, *(shared or ()))]
        sizes = [sum(math.prod(s) for s in found.values()) for found in shapes]
        held = 4 * sum(sizes)
        if shared is None:
            if not shapes:
                return cls(1, 0, 0, 0)
            ins = {n: s for n, s in shapes[0].items() if "lora_A" in n}
            outs = (shapes[0].get(n.replace("lora_A", "lora_B"), [0]) for n in ins)
            largest = max(
                (a[-1] * b[0] for a, b in zip(ins.values(), outs, strict=True)), default=0
            )
            return cls(1, held, 0, largest)
        own, under = sizes[: len(adapters)], sizes[len(adapters) :]
        # A composition that stands on the shared adapters has their rank and its own.
        rest = [size - under[0] if under and size >= under[0] else size for size in own]
        exact = runtime == "onnx" or precision == "fp32"  # else float16, and 8 bits if shared
        shipped = (4 if exact else 2) * sum(rest) + (4 if exact else 1) * sum(under)
        return cls(1 + len(own) if runtime == "executorch" else 1, held, shipped, 0)


def _has_names(whole: PreTrainedModel, read: Mapping[str, object]) -> bool:
    """Whether a checkpoint's tensors are named as the parameters."""
    tied = {**(whole.all_tied_weights_keys or {})}
    names = (name for name, _ in whole.named_parameters(remove_duplicate=False))
    return all(tied.get(name, name) in read for name in names)


def _cache(whole: PreTrainedModel, context: int | None, bits: int | None) -> int:
    """Bytes of one method's keys and values, which ExecuTorch holds until all are emitted."""
    from caliport.export.decoder.checks import cache_shape

    config = whole.config.get_text_config()
    heads, dim = cache_shape(whole)
    length = context or int(config.max_position_embeddings)
    return 2 * int(config.num_hidden_layers) * heads * dim * length * (bits or 32) // 8


def _rotary_tables(whole: PreTrainedModel, context: int | None) -> int:
    """Bytes of the sines and cosines in an ONNX graph, float32 [context, turned / 2] each."""
    config = whole.config.get_text_config()
    length = context or int(config.max_position_embeddings)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, Mapping)] or [rope]
    return sum(int(4 * length * dim * kind.get("partial_rotary_factor", 1.0)) for kind in kinds)


_BYTES = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}


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


def _headers(directory: Path) -> Iterator[tuple[str, str, list[int]]]:
    """Name, type and shape of each tensor in the files that transformers, or PEFT, would load."""
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
                part = tensors.get_slice(name)
                yield name, part.get_dtype(), part.get_shape()


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{max(size, 0) / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(10, 10 * round(seconds / 10))} seconds"
    return f"{round(seconds / 60)} minutes"
