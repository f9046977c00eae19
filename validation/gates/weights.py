"""Does an artifact hold the requested weights, W0 + ΔW, quantized, bit for bit?

Where it does not, the difference shows what went wrong. A composition that lacks an adapter, holds
it twice or holds another one differs by a matrix of low rank, as every adapter is. A weight that
was quantized in another way differs by no more than quantization does. Anything else was lost in
lowering.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from caliport.core.directories import content_hash
from caliport.export.artifact import Artifact
from caliport.validation.gates.limits import WEIGHTS
from caliport.validation.records.gate import Gate
from caliport.validation.runners import engine as engines
from caliport.validation.runners.weights import (
    StoredWeight,
    energy_beyond,
    matrices_of,
    requested_weight,
)

if TYPE_CHECKING:
    from caliport.export.decoder.shipped import ShippedDecoder

_INSPECTED = 8  # differing matrices whose cause is looked for
_NOISE = 3.0  # multiple of quantization's energy that still counts as quantization
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


def weights_gate(artifact: Artifact, source: Source) -> Gate:
    """Compare every weight matrix of an artifact with the requested one.

    Args:
        artifact: A fold.
        source: What it should be made from.

    Raises:
        InputError: The base or the adapter cannot be read, or do not fit.
    """
    from caliport.export.decoder.shipped import shipped_decoder
    from caliport.export.decoder.stored import reading
    from caliport.validation.gates.calibrated import inspect
    from caliport.validation.runners.weights import ArtifactIntegers

    how = artifact.quantization
    with TemporaryDirectory(prefix="caliport-weights-") as scratch, ExitStack() as made:
        known = ArtifactIntegers(artifact, source.base) if artifact.calibrated else None
        decoder = made.enter_context(
            shipped_decoder(
                source.base,
                source.adapter,
                how,
                Path(scratch),
                integers=None if known is None else lambda _: known.read(),
            )
        )
        count = len(matrices_of(decoder))
        update = decoder.adapter.update if decoder.adapter is not None else None
        ranks = {} if update is None else {name: update.rank(name) for name in update.modules}
        engine = engines.get(artifact.runtime)
        odd = engine.differing_weights(artifact, decoder, ranks)
        if known is not None and not odd:
            with reading(source.base) as read:
                tied = decoder.whole.all_tied_weights_keys or {}
                found = inspect(known, decoder, lambda name: read(tied.get(name, name)))
            stale = _stale(artifact, source) if found.odd else None
            return _gate(len(found.odd), count, found.stage, stale or found.reason)
        if not odd:
            return _gate(0, count, "adapter", "all are W0 + ΔW as asked for, bit for bit")
        stale = _stale(artifact, source)
        if stale is not None:
            return _gate(len(odd), count, "adapter", stale)
        plain = made.enter_context(shipped_decoder(source.base, None, "fp32", Path(scratch)))
        causes = [
            _cause(name, find(), decoder, plain) for name, find in list(odd.items())[:_INSPECTED]
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


def _stale(artifact: Artifact, source: Source) -> str | None:
    """Which input has changed since the artifact was made, as its manifest records it."""
    recorded = artifact.inputs
    given = {"base": source.base, "adapter": source.adapter}
    for name, place in given.items():
        if place is None and name in recorded:
            return f"made with an {name}, none was given"
        if place is not None and Path(place).exists():
            known = recorded.get(name)
            if known is None or (":" not in known and known != content_hash(Path(place))):
                return f"made from another {name} than {place}; export again"
    return None


def _cause(
    name: str, found: StoredWeight | None, decoder: ShippedDecoder, plain: ShippedDecoder
) -> tuple[str, str]:
    """The stage that a differing matrix is attributed to, and the evidence for it."""
    if found is None:
        return "lowering", "no such matrix is in the artifact"
    wanted = requested_weight(decoder.weights, name)
    if found.data.shape != wanted.data.shape:
        return "lowering", f"{list(found.data.shape)}, expected {list(wanted.data.shape)}"
    if found.scale is not None and wanted.scale is not None:
        if found.scale.shape != wanted.scale.shape:
            groups = [scale.shape[1] for scale in (found.scale, wanted.scale)]
            return "quantization", f"{groups[0]} scales a row, expected {groups[1]}"
        if torch.equal(found.data, wanted.data):
            return "quantization", "the integers are right, the scales are not"
    from caliport.export.decoder.fold import Folded

    full = f"{name}.weight"
    base, adapter = plain.weights[full].tensor(), decoder.adapter
    if adapter is None or full not in adapter.parameters:
        return _cause_of_values(found, wanted, base, None, 0)
    folded = Folded.of(adapter, plain.whole.get_submodule(name), full, base)
    rank = min(base.shape)
    if folded.factor is None and name in adapter.update.modules:
        rank = adapter.update.rank(name)
    return _cause_of_values(found, wanted, base, folded.rows(0, len(base)) - base, rank)


def _cause_of_values(
    found: StoredWeight, wanted: StoredWeight, base: Tensor, delta: Tensor | None, rank: int
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
    if energy_beyond(difference, rank) > allowed:
        return "lowering", "the difference is of full rank"
    held = float(((found.values() - base) * delta).sum() / delta.square().sum())
    return "adapter", f"the difference is of low rank, as an adapter is; it holds {held:.2f} of ΔW"
