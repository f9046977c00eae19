"""Exports from flags, one artifact or a bundle, and which layers lose most at 4 bits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from caliport.data.examples import read_jsonl
from caliport.shipping import bundle_to, export_to
from caliport_core.errors import InputError
from caliport_core.progress import console, progress
from export.artifact import RUNTIMES, Quantization

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


def export_one(
    base: str,
    adapter: Path | None,
    runtime: str,
    how: Quantization,
    context: int | None,
    out: Path,
    *,
    preflight: bool = True,
    repo_id: str | None = None,
    private: bool = False,
) -> None:
    """Export one artifact into ``out`` and push it to ``repo_id`` where one is given."""
    _check(runtime, repo_id)
    title = f"{runtime} {how.precision}"
    export_to(out, title, base, adapter, runtime, how, context, preflight=preflight)
    _finish("artifact", out, repo_id, private)


def bundle_one(
    base: str,
    compositions: Sequence[str],
    shared: Sequence[str],
    runtime: str,
    how: Quantization,
    context: int | None,
    out: Path,
    *,
    preflight: bool = True,
    repo_id: str | None = None,
    private: bool = False,
) -> None:
    """Export a bundle of compositions, each ``NAME=DIR``, over one base; push it as ``export_one``.

    Raises:
        InputError: A flag that is no ``NAME=DIR``, an unknown runtime, shared adapters with onnx.
    """
    _check(runtime, repo_id)
    parts, adapters = named("--bundle", compositions), named("--share", shared)
    if runtime == "onnx" and adapters:
        raise InputError("--share goes with --runtime executorch; an .onnx_adapter holds all of it")
    title = f"bundle of {len(parts)}: {runtime} {how.precision}"
    bundle_to(out, title, base, parts, adapters, runtime, how, context, preflight=preflight)
    _finish("bundle", out, repo_id, private)


def _check(runtime: str, repo_id: str | None) -> None:
    from export.hub import check_repo_id

    if runtime not in RUNTIMES:
        raise InputError(f"--runtime is {runtime!r}, expected one of {', '.join(RUNTIMES)}")
    if repo_id is not None:
        check_repo_id(repo_id)


def _finish(kind: str, out: Path, repo_id: str | None, private: bool) -> None:
    from export.hub import push

    console.print(f"{kind}: {out}")
    if repo_id is not None:
        console.print(f"pushed: {push(out, repo_id, private=private)}")


def add_to_bundle(bundle: Path, compositions: Sequence[str]) -> None:
    """Add compositions, each ``NAME=DIR``, to a finished bundle for ONNX.

    Raises:
        InputError: See ``export.onnx_bundle.add_to_onnx_bundle``.
    """
    from export.onnx_bundle import add_to_onnx_bundle

    for name, path in named("--bundle", compositions).items():
        console.print(f"added: {add_to_onnx_bundle(bundle, name, path)}")


def named(flag: str, values: Sequence[str]) -> dict[str, Path]:
    """Directories by name, from a flag's values, each ``NAME=DIR``.

    Raises:
        InputError: Another value, or a name twice.
    """
    found: dict[str, Path] = {}
    for value in values:
        name, is_pair, path = value.partition("=")
        if not is_pair or not name or not path:
            raise InputError(f"{flag}: found {value!r}, expected NAME=DIR")
        if name in found:
            raise InputError(f"{flag}: found {name} twice, expected each name once")
        found[name] = Path(path)
    return found
