"""Estimate an export's memory, disk and time before any weight is read.

The estimate uses the decoder of ``config.json``, built without weights, and the headers of the
safetensors files:

    artifact = every matrix as its runtime stores it + graph + tokenizer + adapters beside the base
    disk     = artifact + all weights as they ship, kept in files until the program is written
    memory   = adapters + the larger of
               READING + TOKENIZER · tokenizer + the largest matrix as read + the largest ΔW
               lowering + TOKENIZER · tokenizer + weights that the runtime copies
             + further methods · (their key-value cache + METHOD · layers)
             + with calibration text READING again, a layer in float32 and the moments of its
             inputs; with a goal, the whole model in float32
    seconds  = start + layer · layers + VALUE[precision] · values
             + with calibration text floating-point operations / OPERATIONS

with sizes in bytes; lowering, start and layer come from the runtime (``runtime.Costs``). Weights
are read, quantized and written one matrix at a time, so the size of the whole model does not count
towards memory. A base given by hub name, or a checkpoint whose tensors are not named like the
model's parameters, is loaded whole, in float32.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from caliport.core.checkpoints import load_config
from caliport.core.errors import InputError
from caliport.core.files import CONFIG
from caliport.core.machine import available_memory, free_disk
from caliport.core.model_files.base_files import is_whole, local, tensors_of
from caliport.core.model_files.base_model import check_base
from caliport.core.model_files.tensor_files import read_header
from caliport.export import runtime as runtimes
from caliport.export.calibrated.bits import MEASURING, RANKING
from caliport.export.decoder.parts import Part, cache_shape, parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from caliport.calibrate.adapter import Adapter
    from caliport.export.request import Request
    from caliport.export.runtime import Costs

READING = 0.75e9
"""Bytes for Python, libraries, slices of matrices, and a skeleton traced at the same time."""
TOKENIZER = 13
"""Bytes in memory for each byte of ``tokenizer.json``."""
GRAPH = 18_000
"""Bytes of graph and of gaps between weights, per layer of a method and once more."""
BESIDE = 64_000
"""Bytes of manifest, card and settings, and what the estimate of a program may lack."""
METHOD = 3e6
"""Bytes in memory per layer of every further method, until all are written."""
OPERATIONS = 60e9
"""Floating-point operations a second."""
VALUE = {"fp32": 20e-9, "int8": 10e-9, "int4": 8e-9}
"""Seconds per value to read, quantize, write and hash it."""


@dataclass(frozen=True)
class Needs:
    """Estimated needs of an export.

    Attributes:
        memory: Peak memory in bytes.
        disk: Peak disk use in bytes.
        artifact: Bytes of the finished artifact.
        seconds: Wall time in seconds.
    """

    memory: int
    disk: int
    artifact: int
    seconds: float


def preflight(request: Request, out: Path, *, refuse: bool = True) -> Needs | None:
    """Print what an export will need and stop if the host does not have it.

    Args:
        request: What will be exported. If the headers of its base cannot be read from the local
            disk, nothing is printed or checked: loading the base then reports the error.
        out: Where the artifact will be written.
        refuse: Raise an error if memory or disk is too small.

    Returns:
        The estimate, or None if it cannot be made.

    Raises:
        InputError: Too little memory (of the machine or of this process's control group) or too
            little disk; a base or layers that cannot be exported at all.
    """
    found = needs(request)
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
                f"{request.base}: {request.label} needs about {_size(wanted)} of {kind}, "
                f"{_size(there)} {where}; free some, or go on with --no-preflight"
            )
    return found


def artifact_bytes(request: Request) -> int:
    """Estimated size of an artifact in bytes, a little more than it will be.

    Raises:
        InputError: The headers of the base cannot be read from the local disk.
    """
    found = needs(request)
    if found is None:
        raise InputError(
            f"{request.base}: its size cannot be told beforehand; expected a local directory with "
            "safetensors"
        )
    return found.artifact + BESIDE


def needs(request: Request) -> Needs | None:
    """Compute the estimate described at the top of this file."""
    from caliport.calibrate.peft_files import read_adapter
    from caliport.export.decoder.fold import untie
    from caliport.export.decoder.skeleton import empty
    from caliport.export.quantization.tensors import plan_of

    base, how, context = request.base, request.quantization, request.context
    costs = runtimes.get(request.runtime).costs
    directory = local(base)
    if directory is None or not (directory / CONFIG).is_file():
        return None
    check_base(base)
    read = tensors_of(directory) if is_whole(base, directory) else {}
    if not read:
        return None
    whole = empty(load_config(directory)[0], buffers=False)
    changes = None
    if request.bundle is None and request.adapter is not None:
        changes = read_adapter(request.adapter).fitted(whole, request.adapter)
        untie(whole, changes)  # a tied head that the adapter changes is stored on its own
    forms = plan_of(whole, how)
    parts = parts_of(whole, forms)
    beside = _Beside.of(request, costs, changes)
    depth = int(whole.config.get_text_config().num_hidden_layers)
    layers = depth * beside.methods
    found = directory.glob("tokenizer*.json")
    tokenizer = sum(file.stat().st_size for file in found if file.is_file())

    artifact = sum(costs.shipped(part) for part in parts) + beside.shipped + tokenizer
    artifact += GRAPH * (layers + 1)
    artifact += costs.graph(whole, context)
    stored = sum(part.stored() for part in parts)
    stored += beside.shipped if costs.keeps_terms else 0

    values = sum(part.values for part in parts if not part.is_tied)
    reading = (
        READING
        + TOKENIZER * tokenizer
        + max(_BYTES.get(t.dtype, 4) * math.prod(t.shape) for t in read.values())
    )
    reading += 4 * beside.largest
    if not os.path.exists(base) or not _has_names(whole, read):
        reading += 4 * values
    copied = costs.copied(parts, how.precision)
    memory = max(reading, costs.lowering + TOKENIZER * tokenizer + copied) + beside.held
    calibration = _Calibration.of(request, parts, depth)
    if calibration.memory:  # what it loaded stays while the graph is lowered
        memory += READING + calibration.memory
    stored += int(calibration.disk)
    cache = _cache(whole, context, how.cache_bits)
    memory += (beside.methods - 1) * (cache + METHOD * depth)
    seconds = costs.start + costs.layer * layers + VALUE[how.precision] * values
    seconds += calibration.operations / OPERATIONS
    return Needs(int(memory), artifact + stored, artifact, seconds)


@dataclass(frozen=True)
class _Beside:
    """What the adapters add to the estimate.

    Attributes:
        methods: Number of methods in the program.
        held: Bytes in memory.
        shipped: Bytes in the artifact.
        largest: Number of values of the largest ΔW that is folded in.
    """

    methods: int
    held: int
    shipped: int
    largest: int

    @classmethod
    def of(cls, request: Request, costs: Costs, changes: Adapter | None) -> _Beside:
        shapes = [_shapes(path) for path in request.adapters()]
        sizes = [sum(math.prod(s) for s in found.values()) for found in shapes]
        held = 4 * sum(sizes)
        if request.bundle is None:
            updates = () if changes is None else (changes.update, changes.embeddings)
            folded = (math.prod(update.shape(n)) for update in updates for n in update.modules)
            return cls(1, held, 0, max(folded, default=0))
        count = len(request.bundle.compositions)
        own, under = sizes[:count], sizes[count:]
        # A composition that contains the shared adapters has their rank and its own.
        rest = [size - under[0] if under and size >= under[0] else size for size in own]
        own_bytes, shared_bytes = costs.term_bytes(request.quantization.precision)
        shipped = own_bytes * sum(rest) + shared_bytes * sum(under)
        return cls(costs.methods(count), held, shipped, 0)


@dataclass(frozen=True)
class _Calibration:
    """What calibration text and a goal add to the estimate.

    Attributes:
        memory: Bytes beside Python and libraries while integers are found or layers measured.
        disk: Bytes of the integers, and of the hidden states between two layers.
        operations: Floating-point operations.
    """

    memory: float = 0
    disk: float = 0
    operations: float = 0

    @classmethod
    def of(cls, request: Request, parts: Sequence[Part], depth: int) -> _Calibration:
        if request.text is None:
            return cls()
        rows = max((part.shape[0] for part in parts if part.is_lookup), default=0)
        tokens = request.text.tokens
        values = sum(part.values for part in parts if not part.is_lookup)
        whole = sum(part.values for part in parts if not part.is_tied)
        matrices = [part for part in parts if part.form == "int4" and not part.is_lookup]
        width = min((part.shape[1] for part in matrices), default=0)
        widest = max((part.shape[1] for part in matrices), default=0)
        hidden = 4 * tokens * width
        disk = sum(part.stored() for part in matrices) + 2 * hidden
        # A layer, its moments, and their ordered copy, inverse and factors.
        memory = 4 * values / depth + 5 * 4 * widest**2 + 3 * hidden
        operations = 2 * tokens * (values + sum(part.shape[1] ** 2 for part in matrices) / 2)
        if request.quantization.tune_norms:  # the float model, its copy, and that as it ships
            memory = max(memory, 4 * whole * 3.5)
            operations += 8 * tokens * whole
        if request.goal is not None:
            # The model, its distributions on the text, and a few of one example.
            memory = max(memory, 4 * (whole * 1.05 + rows * 2 * MEASURING))
            count = sum(part.form == "int4" for part in parts)
            operations += 2 * whole * (0.6 * count * RANKING + 10 * MEASURING)
        return cls(memory, disk, operations)


def _has_names(whole: PreTrainedModel, read: Mapping[str, object]) -> bool:
    """Whether a checkpoint's tensors have the names of the model's parameters."""
    tied = {**(whole.all_tied_weights_keys or {})}
    names = (name for name, _ in whole.named_parameters(remove_duplicate=False))
    return all(tied.get(name, name) in read for name in names)


def _cache(whole: PreTrainedModel, context: int | None, bits: int | None) -> int:
    """Bytes of one method's keys and values, which ExecuTorch holds until all are emitted."""
    config = whole.config.get_text_config()
    heads, dim = cache_shape(whole.config)
    length = context or int(config.max_position_embeddings)
    return 2 * int(config.num_hidden_layers) * heads * dim * length * (bits or 32) // 8


_BYTES = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}


def _shapes(adapter: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in the files of an adapter."""
    return {
        name: tensor.shape
        for file in sorted(adapter.glob("*.safetensors"))
        for name, tensor in read_header(file).items()
    }


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{max(size, 0) / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(10, 10 * round(seconds / 10))} seconds"
    return f"{round(seconds / 60)} minutes"
