"""``caliport sensitivity``: measure which layers lose most at 4 bits."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from caliport.core.places import check_new_file, write_text
from caliport.core.progress import console, progress
from caliport.core.prompts import prompted, recorded_prompt
from caliport.flags.validate import read_prompts

_SHOWN = 12


def show_sensitivity(
    base: str | Path,
    adapter: Path | None,
    prompts: Path | None,
    prompt: str | None,
    share: float,
    out: Path | None,
) -> None:
    """Measure every linear layer at 4 bits; show the most sensitive ones and which to keep at 8.

    Args:
        base: A Hugging Face directory.
        adapter: A PEFT LoRA directory to fold in first, or None.
        prompts: JSON Lines with ``input`` and ``output``; None for the built-in prompts.
        prompt: Prompt template with ``{input}``; None for the one that the adapter records.
        share: Extra bytes allowed for 8 bits, as a share of the bytes of all layers at 4 bits.
        out: A JSON file to write, or None.

    Raises:
        InputError: See ``caliport.export.quantization.sensitivity``; or ``out`` already exists.
    """
    from caliport.core.checkpoints import load_tokenizer
    from caliport.export.quantization.sensitivity import keep_at_int8, sensitivities
    from caliport.export.quantization.tensors import plan
    from caliport.export.reference.folded import eager
    from caliport.validation.evaluation.evaluation import make_evaluation

    if out is not None:
        check_new_file(out)
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
        layers = sensitivities(model, texts, lambda name: advance(next(done), name))
    kept = keep_at_int8(layers, share)
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
    flags = " ".join(f"--int8-layer {name}" for name in kept)
    console.print(f"within {share:.0%} more bytes: {flags or 'no layer fits'}", soft_wrap=True)
    if out is not None:
        found = {"share": share, "int8_layers": kept, "layers": [asdict(x) for x in layers]}
        write_text(out, json.dumps(found, indent=2) + "\n")
