"""Integers, and layers at 8 bits, for a request that is calibrated on text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.errors import InputError
from caliport.core.model_files.inputs import input_hash
from caliport.core.untrusted import shown
from caliport.export.quantization.quantizers.registry import CALIBRATED, needs_text
from caliport.export.request import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from caliport.export.calibrated.bits import Measured
    from caliport.export.decoder.shipped import IntegerSource, Plan, ShippedDecoder
    from caliport.export.quantization.choices import Quantization
    from caliport.export.quantization.tensors import KnownIntegers
    from caliport.export.quantization.text import CalibrationText

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
    if request.goal is not None and not needed:
        raise InputError(
            f"a size or divergence to reach: goes with int4 and calibration text, found "
            f"{how.precision} without"
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
    """Decide which layers stay at 8 bits, if a request has a goal, and tune gains, if it asks.

    Args:
        request: What to export.
        place: As for ``integers_of``; it also keeps what was measured.
        bytes_of: Size of the artifact of a request.
        check: Called with the decoder on the ``meta`` device before anything is measured.

    Returns:
        The request with those layers named, what finds its integers and gains, and manifest
        entries: the divergence from float with these layers and with none at 8 bits, before gains
        are tuned, and of how many tokens.

    Raises:
        InputError: See ``caliport.export.calibrated.bits.choose``.
    """
    how = request.quantization
    if request.goal is None and not how.tune_norms:
        return request, integers_of(request, place), {}
    ready = _Ready.of(request, place, check)
    known, bits = ready.known, {}
    if request.goal is not None:
        from caliport.export.calibrated.bits import choose

        found = ready.measured()

        def size(how: Quantization) -> int:
            return bytes_of(replace(request, quantization=how))

        names = choose(request.goal, found, size)
        how = found.with_kept(names)
        bits["bits"] = {
            **{key: value for key, value in asdict(request.goal).items() if value is not None},
            "kl": found.divergence(names),
            "kl_without": found.divergence(()),
            "tokens": found.tokens,
        }
    if how.tune_norms:
        from caliport.export.calibrated.integers import Integers
        from caliport.export.calibrated.norms import tune_norms

        (texts,) = ready.text.sequences(ready.tokenizer, ready.model).values()
        tune_norms(ready.model, how, texts, known, place)
        known = Integers(place, tuned=True)
    return replace(request, quantization=how), lambda _: known, bits


def measured_for(request: Request, place: Path) -> Measured:
    """Measure the layers of a request's base, with its adapter, after calibrated rounding.

    Args:
        request: Of a quantizer that needs text, with text. Of a bundle the base is measured
            without its compositions.
        place: As for ``integers_of``; it also keeps what was measured.
    """
    return _Ready.of(request, place, lambda model: None).measured()


@dataclass(frozen=True)
class _Ready:
    """A request whose integers are found, and its float model."""

    request: Request
    text: CalibrationText
    place: Path
    plan: Plan
    known: KnownIntegers
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, request: Request, place: Path, check: Callable[[PreTrainedModel], None]) -> _Ready:
        from caliport.core.checkpoints import load_tokenizer
        from caliport.export.decoder.fold import load_folded
        from caliport.export.decoder.shipped import planned

        plan = planned(request.base, request.adapter, request.quantization, check)
        source = integers_of(request, place)
        assert source is not None
        assert request.text is not None
        known = source(plan)
        model = load_folded(request.base, request.adapter)
        tokenizer = load_tokenizer(request.base, plan.whole)
        return cls(request, request.text, place, plan, known, model, tokenizer)

    def measured(self) -> Measured:
        from caliport.export.calibrated.bits import MEASURING, measured

        texts = self.text.held_out(self.tokenizer, self.model, MEASURING)
        key, how = _key(self.request, self.plan), self.request.quantization
        return measured(self.model, how, texts, self.known, self.place, key)


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
