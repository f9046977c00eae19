"""Integers for a request whose quantizer measures on text what layers are fed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.errors import InputError
from caliport.core.model_files.inputs import input_hash
from caliport.core.untrusted import shown
from caliport.export.quantization.quantizers.registry import CALIBRATED, needs_text
from caliport.export.request import Request

if TYPE_CHECKING:
    from caliport.export.decoder.shipped import IntegerSource, Plan, ShippedDecoder
    from caliport.export.quantization.tensors import KnownIntegers

DIGITS = 32
"""Hexadecimal digits of a matrix's hash in a manifest."""


def check_text(request: Request) -> None:
    """Check that a request has calibration text if, and only if, its quantizer needs it.

    Raises:
        InputError: No such quantizer, text is missing, or text would not be read.
    """
    how = request.quantization
    needed = needs_text(how.quantizer)
    if needed and request.text is None:
        raise InputError(
            f"quantizer {how.quantizer} measures on text what layers are fed; expected "
            "calibration text too"
        )
    if request.text is not None:
        names = {""} if request.bundle is None else {"", *request.bundle.compositions}
        if odd := sorted(set(request.text.sources) - names):
            raise InputError(
                f"calibration text: found one for {shown(odd[0])}, which is no composition of this "
                "artifact; expected a file, or one for each composition of a bundle"
            )
    if request.text is not None and not needed:
        with_one = f"int4 with quantizer {CALIBRATED}"
        raise InputError(f"calibration text goes with {with_one}, found {how.precision}")


def integers_of(request: Request, place: Path) -> IntegerSource | None:
    """What finds the integers of a request on its text; None if its quantizer needs none.

    Args:
        request: What to export.
        place: A directory for the integers, which other runtimes' requests may share. What was
            found there before for the same base, adapters and text is taken again.
    """
    text, quantizer = request.text, request.quantization.quantizer
    if text is None or quantizer is None:
        return None

    def find(plan: Plan) -> KnownIntegers:
        from caliport.calibrate.adapter import Adapter
        from caliport.core.checkpoints import load_tokenizer
        from caliport.export.decoder.calibrated import Calibration, calibrated_integers
        from caliport.export.decoder.terms import read_updates

        updates = {} if request.bundle is None else request.bundle.compositions
        beside = {n: Adapter(u) for n, u in read_updates(request.base, updates).items()}
        sequences = text.sequences(load_tokenizer(request.base, plan.whole), plan.whole)
        what = Calibration(request.base, quantizer, sequences, beside)
        return calibrated_integers(plan, what, place, _key(request, plan))

    return find


def calibrated(decoder: ShippedDecoder, request: Request) -> dict[str, Any]:
    """Manifest entries: the text, and the hash of every matrix that was quantized on it.

    ``weights`` has, by module, the first digits of the SHA-256 of the packed integers and of the
    scales, as ``caliport.export.decoder.stored`` stores them. A base alone does not give these
    integers again, so validation reads the artifact's own and checks them against this.
    """
    assert request.text is not None
    digits = {
        name: [
            decoder.weights[f"{name}.weight.{part}"].sha256.hex()[:DIGITS]
            for part in ("data", "scale")
        ]
        for name, form in decoder.forms.items()
        if form == "int4"
    }
    return {**request.text.settings(), "weights": digits}


def _key(request: Request, plan: Plan) -> dict[str, Any]:
    import torch

    shared = {} if request.bundle is None else request.bundle.shared
    inputs = {k: p for k, p in request.inputs().items() if p not in shared.values()}
    assert request.text is not None
    return {
        "inputs": {label: input_hash(path) for label, path in inputs.items()},
        "text": request.text.settings(),
        "quantizer": request.quantization.quantizer,
        "layers": sorted(name for name, form in plan.forms.items() if form == "int4"),
        "torch": torch.__version__,
    }
