"""``caliport sensitivity``: measure which layers lose most at 4 bits."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rich.table import Table

from caliport.core.errors import InputError
from caliport.core.places import check_new_file, write_text
from caliport.core.progress import console, progress, working
from caliport.core.prompts import prompted, recorded_prompt
from caliport.flags.validate import read_prompts

if TYPE_CHECKING:
    from caliport.export.calibrated.bits import Measured
    from caliport.export.calibrated.sensitivity import Sensitivity
    from caliport.export.quantization.text import CalibrationText

_SHOWN = 12
_SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)


def show_sensitivity(
    base: str | Path,
    adapter: Path | None,
    prompts: Path | None,
    prompt: str | None,
    share: float,
    out: Path | None,
    calibration: CalibrationText | None = None,
) -> None:
    """Measure every linear layer at 4 bits; show the most sensitive ones and which to keep at 8.

    Args:
        base: A Hugging Face directory.
        adapter: A PEFT LoRA directory to fold in first, or None.
        prompts: JSON Lines with ``input`` and ``output``; None for the built-in prompts.
        prompt: Prompt template with ``{input}``; None for the one that the adapter records.
        share: Extra bytes allowed for 8 bits, as a share of the bytes of all layers at 4 bits.
        out: A JSON file to write, or None.
        calibration: Text to calibrate on; layers are then measured after calibrated rounding, on
            other parts of the text, and the whole model at several sizes.

    Raises:
        InputError: See ``caliport.export.calibrated.sensitivity``; ``share`` is below 0; or ``out``
            already exists.
    """
    from caliport.export.calibrated.sensitivity import keep_at_int8

    if out is not None:
        check_new_file(out)
    if not share >= 0:
        raise InputError(f"share: found {share}, expected 0 or more")
    curve: list[dict[str, float]] = []
    if calibration is None:
        layers = _measured(base, adapter, prompts, prompt)
    else:
        if prompts is not None or prompt is not None:
            raise InputError("--prompts and --prompt do not go with --calibration FILE")
        layers, curve = _after_calibration(base, adapter, calibration)
    whole = sum(layer.values / 2 for layer in layers)
    kept = keep_at_int8(layers, share * whole)
    table = Table(title="Loss of each layer at 4 bits")
    table.add_column("layer")
    table.add_column("KL, nats per token", justify="right")
    table.add_column("at 8 bits", justify="right")
    for layer in layers[:_SHOWN]:
        table.add_row(
            layer.name,
            f"{layer.divergence:.2e}",
            f"+{layer.extra_bytes / 1e3:,.0f} kB" if layer.name in kept else "",
        )
    console.print(table)
    if len(layers) > _SHOWN:
        console.print(f"and {len(layers) - _SHOWN} less sensitive layers")
    if curve:
        table = Table(title="Loss of the whole model")
        table.add_column("bytes for 8 bits", justify="right")
        table.add_column("KL, nats per token", justify="right")
        for point in curve:
            table.add_row(f"+{point['bytes'] / whole:.0%}", f"{point['kl']:.4f}")
        console.print(table)
    flags = " ".join(f"--int8-layer {name}" for name in kept)
    console.print(f"within {share:.0%} more bytes: {flags or 'no layer fits'}", soft_wrap=True)
    if out is not None:
        found = {"share": share, "int8_layers": kept, "layers": [asdict(x) for x in layers]}
        found |= {"curve": curve} if curve else {}
        write_text(out, json.dumps(found, indent=2) + "\n")


def _measured(
    base: str | Path, adapter: Path | None, prompts: Path | None, prompt: str | None
) -> list[Sensitivity]:
    from caliport.core.checkpoints import load_tokenizer
    from caliport.export.calibrated.sensitivity import sensitivities
    from caliport.export.quantization.tensors import plan
    from caliport.export.reference.folded import eager
    from caliport.validation.evaluation.evaluation import make_evaluation

    model = eager(base, adapter, "fp32")
    pairs, places = read_prompts(prompts, prompt)
    recorded = None if adapter is None else recorded_prompt(adapter)
    evaluation = make_evaluation(
        model,
        load_tokenizer(base, model),
        None if pairs is None else prompted([text for text, _ in pairs], prompt, recorded),
        None if pairs is None else [answer for _, answer in pairs],
        places=places,
    )
    texts = [
        [*before, *after]
        for before, after in zip(evaluation.prompts, evaluation.targets, strict=True)
    ]
    count = sum(form == "int4" for form in plan(model, "int4").values())
    with progress("layers at 4 bits", count) as advance:
        done = iter(range(count))
        return _worst_first(sensitivities(model, texts, lambda name: advance(next(done), name)))


def _after_calibration(
    base: str | Path, adapter: Path | None, text: CalibrationText
) -> tuple[list[Sensitivity], list[dict[str, float]]]:
    from caliport.export.calibrated.requests import measured_for
    from caliport.export.quantization.choices import Quantization
    from caliport.export.quantization.quantizers.registry import CALIBRATED
    from caliport.export.request import Request

    how = Quantization("int4", quantizer=CALIBRATED)
    request = Request(base, "onnx", how, adapter=adapter, text=text)
    with TemporaryDirectory(prefix="caliport-integers-") as place, working("layers at 4 bits"):
        found = measured_for(request, Path(place))
        return _worst_first(found.layers), [_point(found, share) for share in _SHARES]


def _point(found: Measured, share: float) -> dict[str, float]:
    from caliport.export.calibrated.sensitivity import keep_at_int8

    whole = sum(layer.extra_bytes for layer in found.layers)
    names = keep_at_int8(found.layers, share * whole)
    extra = sum(layer.extra_bytes for layer in found.layers if layer.name in names)
    return {"bytes": extra, "kl": found.divergence(names)}


def _worst_first(layers: Iterable[Sensitivity]) -> list[Sensitivity]:
    return sorted(layers, key=lambda layer: -layer.divergence)
