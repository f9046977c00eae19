"""The 4-bit integers of a run: those that ship are those that are scored and trained through."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from typing import TYPE_CHECKING, Any

from caliport.export.artifact import BASE_ALONE
from caliport.export.quantization.choices import Quantization
from caliport.export.quantization.quantizers.registry import CALIBRATED, DEFAULTS, needs_text
from caliport.export.quantization.text import CalibrationText
from caliport.export.request import Request
from caliport.recipe.methods import parse
from caliport.recipe.schema import Recipe
from caliport.run.resolve import best_method, source_of
from caliport.run.workspace import Workspace
from caliport.stages.stage import stage

if TYPE_CHECKING:
    from caliport.export.quantization.tensors import KnownIntegers

_BUNDLE = "int4-bundle"


def folded_quantizer(space: Workspace, method: str) -> str:
    """The quantizer of an artifact with a method's adapter folded in: the recipe's, or a default.

    By default it needs text, which is at hand here. A correction that was trained through int4
    makes up for the errors of the quantizer without text, so it ships with that.
    """
    if space.recipe.export.quantizer is not None:
        return space.recipe.export.quantizer
    trained = not method.startswith("lora-") and parse(method).precision is not None
    return DEFAULTS[4] if trained else CALIBRATED


def bundle_quantizer(space: Workspace) -> str:
    """The quantizer of the base of bundles."""
    recipe = space.recipe
    if recipe.export.quantizer is not None or is_frozen(recipe):
        return recipe.export.quantizer or CALIBRATED
    found = {folded_quantizer(space, best_method(space, name)) for name in recipe.compositions}
    return DEFAULTS[4] if DEFAULTS[4] in found else CALIBRATED


def folded_text(space: Workspace, composition: str) -> CalibrationText:
    """A composition's own training examples."""
    source = source_of(space, composition, tuned=False)
    return CalibrationText({"": source}, space.recipe.export.calibration_tokens)


def bundle_text(space: Workspace) -> CalibrationText:
    """The training examples of all compositions."""
    recipe = space.recipe
    sources = {name: source_of(space, name, tuned=False) for name in recipe.compositions}
    return CalibrationText(sources, recipe.export.calibration_tokens, alone=is_frozen(recipe))


def bundle_place(space: Workspace) -> Path:
    """Where the integers of the base of bundles are kept."""
    return frozen_base(space, _BUNDLE) or space.kept("integers", BASE_ALONE)


def folded_request(
    space: Workspace, composition: str, method: str, adapter: Path | None
) -> Request:
    """The request whose integers a method is scored with in int4, whatever the runtime."""
    export, quantizer = space.recipe.export, folded_quantizer(space, method)
    how = Quantization(
        "int4", export.int8_layers, export.embedding_bits, None, quantizer, export.tune_norms
    )
    text = folded_text(space, composition) if needs_text(how.quantizer) else None
    return Request(space.base, "onnx", how, adapter=adapter, text=text)


def known_integers(request: Request, place: Path) -> KnownIntegers | None:
    """What a request ships with, found if it is not there; None if none need to be kept."""
    from caliport.export.calibrated.requests import decided
    from caliport.export.decoder.shipped import planned
    from caliport.export.preflight import artifact_bytes

    request, source, _ = decided(request, place, artifact_bytes)
    if source is None:
        return None
    return source(planned(request.base, request.adapter, request.quantization))


def is_frozen(recipe: Recipe) -> bool:
    """Whether something is trained through, or scored on, the calibrated base of a bundle.

    That base is then calibrated by itself, before there are compositions.
    """
    methods = map(parse, recipe.calibration.methods)
    wanted = any(m.bundle and m.precision == "int4" for m in methods)
    return needs_text(recipe.export.quantizer or CALIBRATED) and (
        wanted or _BUNDLE in recipe.evaluation.quantized
    )


def frozen_base(space: Workspace, form: str) -> Path | None:
    """The directory of a frozen base's integers, made if it is not there.

    Args:
        space: The run.
        form: What is trained through or scored; None is returned for all but ``int4-bundle``.
    """
    if form != _BUNDLE or not is_frozen(space.recipe):
        return None
    export, quantizer = space.recipe.export, bundle_quantizer(space)
    how = Quantization("int4", export.int8_layers, export.embedding_bits, None, quantizer)
    request = Request(space.base, "onnx", how, text=bundle_text(space))

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        known_integers(request, resume)
        copytree(resume, partial, dirs_exist_ok=True)

    out = space.shared(_BUNDLE)
    settings = request.settings()
    stage(out, "integers", "base of bundles in int4", request.inputs(), settings, build)
    return out
