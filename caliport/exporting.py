"""Bundles from flags, and which layers lose most at 4 bits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from caliport.data.examples import read_jsonl
from caliport_core.errors import InputError
from caliport_core.progress import console, progress, working
from export.artifact import RUNTIMES

_SHOWN = 12


def show_sensitivity(
    base: str | Path,
    adapter: Path | None,
    prompts: Path | None,
    prompt: str,
    share: float,
    out: Path | None,
) -> None:
    """Measure every linear layer at 4 bits; show the most sensitive and which to keep at 8.

    Args:
        base: A Hugging Face directory.
        adapter: A PEFT LoRA directory to fold in first, or None.
        prompts: JSON Lines with ``input`` and ``output``; None for the built-in prompts.
        prompt: Around each input.
        share: Bytes to spend on 8 bits, as a share of what all layers take at 4.
        out: A JSON file to write, or None.

    Raises:
        InputError: See ``export.sensitivity``; or ``out`` is there already.
    """
    from caliport_core.checkpoints import load_tokenizer
    from export.artifact import eager
    from export.quantize import plan
    from export.sensitivity import keep_at_int8, sensitivities
    from validation.evaluation import make_evaluation

    if out is not None and out.exists():
        raise InputError(f"{out}: is there already; name a new file")
    model = eager(base, adapter, "fp32")
    examples = read_jsonl(prompts) if prompts is not None else None
    evaluation = make_evaluation(
        model,
        load_tokenizer(base, model),
        [prompt.replace("{input}", e.input) for e in examples] if examples else None,
        [e.output for e in examples] if examples else None,
    )
    texts = [
        [*before, *after]
        for before, after in zip(evaluation.prompts, evaluation.targets, strict=True)
    ]
    count = sum(form == "int4" for form in plan(model, "int4").values())
    with progress("layers at 4 bits", count) as advance:
        done = iter(range(count))
        layers = sensitivities(model, texts, lambda name: advance(next(done), name))
    kept = keep_at_int8(layers, share)
    table = Table(title="What each layer loses at 4 bits alone")
    table.add_column("layer")
    table.add_column("KL, nats a token", justify="right")
    table.add_column("at 8 bits", justify="right")
    for layer in layers[:_SHOWN]:
        table.add_row(
            layer.name,
            f"{layer.divergence:.2e}",
            f"+{layer.extra_bytes / 1e3:,.0f} kB" if layer.name in kept else "",
        )
    console.print(table)
    if len(layers) > _SHOWN:
        console.print(f"and {len(layers) - _SHOWN} less sensitive ones")
    flags = " ".join(f"--int8-layer {name}" for name in kept)
    console.print(f"within {share:.0%} more bytes: {flags or 'no layer fits'}", soft_wrap=True)
    if out is not None:
        found = {"share": share, "int8_layers": kept, "layers": [asdict(x) for x in layers]}
        out.write_text(json.dumps(found, indent=2) + "\n")


def bundle_one(
    base: str | Path,
    compositions: Sequence[str],
    shared: Sequence[str],
    runtime: str,
    precision: str,
    context: int | None,
    out: Path,
) -> None:
    """Export a bundle of compositions, each ``NAME=DIR``, over one base.

    Raises:
        InputError: A flag that is no ``NAME=DIR``, an unknown runtime, shared adapters with onnx.
    """
    from export.bundling import to_executorch_bundle
    from export.onnx_bundle import to_onnx_bundle

    named, adapters = _named("--bundle", compositions), _named("--share", shared)
    if runtime not in RUNTIMES:
        raise InputError(f"--runtime is {runtime!r}, expected one of {', '.join(RUNTIMES)}")
    if runtime == "onnx" and adapters:
        raise InputError("--share goes with --runtime executorch; an .onnx_adapter holds all of it")
    with working(f"bundle of {len(named)}"):
        if runtime == "onnx":
            to_onnx_bundle(base, named, out, precision=precision, context=context)
        else:
            to_executorch_bundle(
                base, named, out, adapters=adapters, precision=precision, context=context
            )
    console.print(f"bundle: {out}")


def add_to_bundle(bundle: Path, compositions: Sequence[str]) -> None:
    """Add compositions, each ``NAME=DIR``, to a finished bundle for ONNX.

    Raises:
        InputError: See ``export.onnx_bundle.add_to_onnx_bundle``; or a bundle for ExecuTorch.
    """
    from caliport_core.directories import read_manifest
    from export.onnx_bundle import add_to_onnx_bundle

    if read_manifest(bundle).get("runtime") == "executorch":
        raise InputError(
            f"{bundle}: a .pte cannot be added to; export the bundle again with all compositions"
        )
    for name, path in _named("--bundle", compositions).items():
        console.print(f"added: {add_to_onnx_bundle(bundle, name, path)}")


def _named(flag: str, values: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for value in values:
        name, is_pair, path = value.partition("=")
        if not is_pair or not name or not path:
            raise InputError(f"{flag}: found {value!r}, expected NAME=DIR")
        if name in found:
            raise InputError(f"{flag}: found {name} twice, expected each name once")
        found[name] = Path(path)
    return found
