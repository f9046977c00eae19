"""Does an artifact hold the weights that were asked for: W0 + ΔW, quantized, bit for bit?

Where it does not, the difference says what went wrong. A composition that lacks an adapter, holds
it twice or holds another one differs by a matrix of low rank, as every adapter is; a weight that
was quantized otherwise differs by no more than quantization does; anything else was lost on the
way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from caliport.core.directories import content_hash, read_manifest
from caliport.export.quantization.choices import Quantization
from caliport.export.quantization.tensors import unpacked
from caliport.validation.artifact import artifact_form
from caliport.validation.gates.limits import WEIGHTS
from caliport.validation.gates.stored import Held, Program, asked_for, held_by_onnx
from caliport.validation.records.gate import Gate

if TYPE_CHECKING:
    from caliport.calibrate.low_rank import LowRankUpdate
    from caliport.export.decoder.shipped import ShippedDecoder

_LOOKED_AT = 8  # differing matrices that are looked into
_NOISE = 3.0  # times the energy of quantization that is still quantization
_FLOAT = 1e-12  # share of a float32 matrix's energy that is rounding


@dataclass(frozen=True)
class Source:
    """What an artifact should be made from.

    Attributes:
        base: A Hugging Face directory or hub name.
        adapter: A PEFT LoRA directory; None for the base alone.
    """

    base: str | Path
    adapter: Path | None


def weights_gate(directory: Path, source: Source) -> Gate:
    """Compare every weight matrix of an artifact with the one that was asked for.

    Args:
        directory: An artifact of one composition.
        source: What it should be made from.

    Raises:
        InputError: The base or the adapter cannot be read, or do not fit.
    """
    from caliport.calibrate.peft_files import read_peft
    from caliport.export.decoder.shipped import shipped_decoder

    how = Quantization.of(read_manifest(directory))
    update = None if source.adapter is None else read_peft(source.adapter)
    with TemporaryDirectory(prefix="caliport-weights-") as scratch, ExitStack() as made:
        decoder = made.enter_context(
            shipped_decoder(source.base, source.adapter, how, Path(scratch))
        )
        count = len(_matrices(decoder))
        ranks = {} if update is None else {name: update.rank(name) for name in update.modules}
        odd = _differing(directory, decoder, ranks)
        if not odd:
            return _gate(0, count, "adapter", "all are W0 + ΔW as asked for, bit for bit")
        stale = _stale(directory, source)
        if stale is not None:
            return _gate(len(odd), count, "adapter", stale)
        plain = made.enter_context(shipped_decoder(source.base, None, "fp32", Path(scratch)))
        causes = [
            _cause(name, find(), decoder, plain, update)
            for name, find in list(odd.items())[:_LOOKED_AT]
        ]
    stage, _ = Counter(stage for stage, _ in causes).most_common(1)[0]
    reason = dict(reversed(causes))[stage]
    shown = ", ".join(list(odd)[:2]) + (f" and {len(odd) - 2} more" if len(odd) > 2 else "")
    return _gate(len(odd), count, stage, f"{shown}: {reason}")


def _gate(odd: int, count: int, stage: str, reason: str) -> Gate:
    return Gate(
        name=WEIGHTS,
        measure="weight matrices that differ from those asked for",
        limit=0,
        found=odd,
        passed=not odd,
        stage=stage,
        reason=f"{odd} of {count} differ: {reason}",
    )


def _matrices(decoder: ShippedDecoder) -> list[str]:
    """Modules whose weight is a matrix."""
    return [
        name
        for name, module in decoder.whole.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
        if key == "weight" and parameter.dim() == 2
    ]


def _stale(directory: Path, source: Source) -> str | None:
    """Which input the artifact was made from before it changed, as its manifest records it."""
    recorded = read_manifest(directory).get("inputs", {})
    given = {"base": source.base, "adapter": source.adapter}
    for name, place in given.items():
        if place is None and name in recorded:
            return f"made with an {name}, none was given"
        if place is not None and Path(place).exists():
            known = recorded.get(name)
            if known is None or (":" not in known and known != content_hash(Path(place))):
                return f"made from another {name} than {place}; export again"
    return None


def _differing(
    directory: Path, decoder: ShippedDecoder, ranks: Mapping[str, int]
) -> dict[str, Callable[[], Held | None]]:
    """Matrices other than those asked for, with what finds what is there instead, if anything."""
    runtime, _ = artifact_form(directory)
    if runtime == "executorch":
        return _differing_in_program(Program(directory / "model.pte"), decoder, ranks)
    names = _matrices(decoder)
    sizes = {name: decoder.whole.get_parameter(f"{name}.weight").shape[0] for name in names}
    odd: dict[str, Held | None] = dict.fromkeys(names)
    for name, found in held_by_onnx(directory / "model.onnx", sizes):
        if name in odd and found.equals(asked_for(decoder.weights, name)):
            del odd[name]
        elif name in odd:
            odd[name] = found
    return {name: partial(odd.get, name) for name in odd}


def _differing_in_program(
    program: Program, decoder: ShippedDecoder, ranks: Mapping[str, int]
) -> dict[str, Callable[[], Held | None]]:
    """By hash; programs do not name their weights."""
    weights, odd = decoder.weights, dict[str, Callable[[], Held | None]]()
    tables = list(program.constants())
    for name in _matrices(decoder):
        plain, data, scale = (f"{name}.weight{part}" for part in ("", ".data", ".scale"))
        keys = [plain] if plain in weights else [data, scale]
        if not all(
            weights[key].sha256 in program or _is_table(tables, weights[key].tensor())
            for key in keys
        ):
            stored, wanted = weights[keys[0]].tensor(), asked_for(weights, name)
            odd[name] = partial(_likeliest, program, stored, wanted, ranks.get(name, 0))
    return odd


def _is_table(tables: Iterable[np.ndarray], wanted: Tensor) -> bool:
    """Whether some constant is these numbers; lookups read scales as float32."""
    wanted = wanted.float() if wanted.dtype == torch.bfloat16 else wanted
    content = wanted.contiguous().view(-1).view(torch.uint8).numpy()
    return any(
        len(table) >= len(content) and np.array_equal(table[: len(content)], content)
        for table in tables
    )


def _likeliest(program: Program, stored: Tensor, wanted: Held, rank: int) -> Held | None:
    """What stands in the place of a matrix: of equal size, and nearest but for an adapter."""
    values = wanted.values()
    near = sorted(
        _alike(program, stored, wanted), key=lambda held: float((held.values() - values).norm())
    )[:_LOOKED_AT]
    if not rank:
        return near[0] if near else None
    return min(near, key=lambda held: _beyond(held.values() - values, rank), default=None)


def _beyond(difference: Tensor, rank: int) -> float:
    """The energy of a matrix that two updates of a rank cannot make, and one row."""
    return float(torch.linalg.svdvals(difference)[2 * rank + 1 :].square().sum())


def _alike(program: Program, stored: Tensor, wanted: Held) -> Iterator[Held]:
    rows, count = wanted.data.shape[0], stored.numel()
    if wanted.scale is None:
        for data in program.matrices():
            if len(data) == 4 * count:
                values = torch.from_numpy(data.view(np.float32).copy())
                yield Held(values.view(rows, -1), None)
        return
    packed = stored.dtype == torch.uint8
    for data, scale in program.pairs():
        scales = torch.from_numpy(scale.copy())
        scales = scales.view(torch.bfloat16 if packed else torch.float32).float()
        if len(data) == count and not scales.numel() % rows:
            whole = torch.from_numpy(data.copy()).view(rows, -1)
            integers = unpacked(whole) if packed else whole.view(torch.int8)
            yield Held(integers, scales.view(rows, -1))


def _cause(
    name: str,
    found: Held | None,
    decoder: ShippedDecoder,
    plain: ShippedDecoder,
    update: LowRankUpdate | None,
) -> tuple[str, str]:
    """The stage that a differing matrix is put down to, and what speaks for it."""
    if found is None:
        return "lowering", "no such matrix is in the artifact"
    wanted = asked_for(decoder.weights, name)
    if found.data.shape != wanted.data.shape:
        return "lowering", f"{list(found.data.shape)}, expected {list(wanted.data.shape)}"
    if found.scale is not None and wanted.scale is not None:
        if found.scale.shape != wanted.scale.shape:
            groups = [scale.shape[1] for scale in (found.scale, wanted.scale)]
            return "quantization", f"{groups[0]} scales a row, expected {groups[1]}"
        if torch.equal(found.data, wanted.data):
            return "quantization", "the integers are right, the scales are not"
    base = plain.weights[f"{name}.weight"].tensor()
    delta = update.delta(name) if update is not None and name in update.modules else None
    if delta is not None and _is_transposed(plain.whole.get_submodule(name)):
        delta = delta.T
    rank = update.rank(name) if update is not None and delta is not None else 0
    return _cause_of_values(found, wanted, base, delta, rank)


def _cause_of_values(
    found: Held, wanted: Held, base: Tensor, delta: Tensor | None, rank: int
) -> tuple[str, str]:
    difference = found.values() - wanted.values()
    whole = base if delta is None else base + delta
    rounding = 2 * float((wanted.values() - whole).square().sum())
    allowed = max(_NOISE * rounding, _FLOAT * float(whole.square().sum()))
    if float(difference.square().sum()) <= allowed:
        return "quantization", "it differs by no more than another rounding does"
    if found.scale is not None:
        groups = difference.unflatten(1, (found.scale.shape[1], -1))
        if float((groups - groups.mean(-1, keepdim=True)).square().sum()) <= allowed:
            return "quantization", "each group is off by one number, as without its zero point"
    if delta is None:
        return "lowering", "no adapter touches it, and it is not the base's"
    if _beyond(difference, rank) > allowed:
        return "lowering", "the difference is of full rank"
    held = float(((found.values() - base) * delta).sum() / delta.square().sum())
    return "adapter", f"the difference is of low rank, as an adapter is; it holds {held:.2f} of ΔW"


def _is_transposed(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
