"""Integers, and layers at 8 bits, for a request that is calibrated on text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.errors import InputError
from caliport.core.model_files.inputs import input_hash
from caliport.core.untrusted import shown
from caliport.export.quantization.quantizers.registry import CALIBRATED, needs_text
from caliport.export.request import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from caliport.export.calibrated.bits import Measured
    from caliport.export.decoder.shipped import IntegerSource, Plan, ShippedDecoder
    from caliport.export.quantization.tensors import KnownIntegers

DIGITS = 32
"""Hexadecimal digits of a matrix's hash in a manifest."""


def check_text(request: Request) -> None:
    """Check that a request has calibration text if, and only if, its quantizer needs it.

    Raises:
        InputError: No such quantizer, text is missing, text would not be read, or a goal for
            another precision.
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
    if how.tune_norms and (not needed or request.bundle is not None):
        raise InputError(
            "tune_norms: goes with int4, a quantizer that needs text, and a fold or a base alone"
        )
    if request.goal is not None:
        if how.precision != "int4":
            raise InputError(
                f"a size or divergence to reach: goes with int4, found {how.precision}"
            )
        if request.text is None:
            raise InputError("a size or divergence to reach: expected calibration text too")
    elif request.text is not None and not needed:
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
        from caliport.export.calibrated.integers import Calibration, calibrated_integers
        from caliport.export.decoder.terms import read_updates

        alone = request.bundle is None or text.alone
        updates = {} if alone or request.bundle is None else request.bundle.compositions
        beside = {n: Adapter(u) for n, u in read_updates(request.base, updates).items()}
        sequences = text.sequences(load_tokenizer(request.base, plan.whole), plan.whole)
        what = Calibration(request.base, quantizer, sequences, beside)
        return calibrated_integers(plan, what, place, _key(request, plan))

    return find


def decided(
    request: Request,
    place: Path,
    bytes_of: Callable[[Request], int],
    check: Callable[[PreTrainedModel], None] = lambda model: None,
) -> tuple[Request, IntegerSource | None, dict[str, Any]]:
    """Decide which layers stay at 8 bits, if a request has a goal.

    Args:
        request: What to export.
        place: As for ``integers_of``; it also keeps what was measured.
        bytes_of: Size of the artifact of a request.
        check: Called with the decoder on the ``meta`` device before anything is measured.

    Returns:
        The request with those layers named, what finds its integers, and manifest entries: the
        divergence from float with these layers and with none at 8 bits, and of how many tokens.

    Raises:
        InputError: See ``caliport.export.calibrated.bits.choose``.
    """
    if request.goal is None:
        if not request.quantization.tune_norms:
            return request, integers_of(request, place), {}
        return request, _tuned(request, place, check), {}
    from caliport.export.calibrated.bits import choose

    found, known = measured_for(request, place, check)
    names = choose(request.goal, found, lambda how: bytes_of(replace(request, quantization=how)))
    facts = {
        **{key: value for key, value in asdict(request.goal).items() if value is not None},
        "kl": found.divergence(names),
        "kl_without": found.divergence(()),
        "tokens": found.tokens,
    }
    chosen = replace(request, quantization=found.with_kept(names))
    if request.quantization.tune_norms:
        return chosen, _tuned(chosen, place, check, known), {"bits": facts}
    return chosen, None if known is None else lambda _: known, {"bits": facts}


def _tuned(
    request: Request,
    place: Path,
    check: Callable[[PreTrainedModel], None],
    known: KnownIntegers | None = None,
) -> IntegerSource:
    """The integers of a request and the gains tuned to them."""
    from caliport.core.checkpoints import load_tokenizer
    from caliport.export.calibrated.integers import Integers
    from caliport.export.calibrated.norms import tune_norms
    from caliport.export.decoder.fold import load_folded
    from caliport.export.decoder.shipped import planned

    assert request.text is not None
    plan = planned(request.base, request.adapter, request.quantization, check)
    if known is None:
        source = integers_of(request, place)
        assert source is not None
        known = source(plan)
    (texts,) = request.text.sequences(load_tokenizer(request.base, plan.whole), plan.whole).values()
    tune_norms(
        load_folded(request.base, request.adapter), request.quantization, texts, known, place
    )
    return lambda _: Integers(place)


def measured_for(
    request: Request,
    place: Path,
    check: Callable[[PreTrainedModel], None] = lambda model: None,
) -> tuple[Measured, KnownIntegers | None]:
    """Measure the layers of a request's base, with its adapter, and find their integers.

    Of a bundle the base is measured without its compositions.
    """
    from caliport.core.checkpoints import load_tokenizer
    from caliport.export.calibrated.bits import MEASURING, measured
    from caliport.export.decoder.fold import load_folded
    from caliport.export.decoder.shipped import planned

    assert request.text is not None
    plan = planned(request.base, request.adapter, request.quantization, check)
    source = integers_of(request, place)
    known = None if source is None else source(plan)
    tokenizer = load_tokenizer(request.base, plan.whole)
    texts = request.text.held_out(tokenizer, plan.whole, MEASURING)
    model = load_folded(request.base, request.adapter)
    key = _key(request, plan)
    return measured(model, request.quantization, texts, known, place, key), known


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

    assert request.text is not None
    inputs = {"base": request.base, **request.text.inputs()}
    if request.adapter is not None:
        inputs["adapter"] = request.adapter
    if request.bundle is not None and not request.text.alone:
        inputs |= {f"composition {name}": p for name, p in request.bundle.compositions.items()}
    return {
        "inputs": {label: input_hash(path) for label, path in inputs.items()},
        "text": request.text.settings(),
        "quantizer": request.quantization.quantizer,
        "layers": sorted(name for name, form in plan.forms.items() if form == "int4"),
        "torch": torch.__version__,
    }
