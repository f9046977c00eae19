"""A bundle's directory: one quantized base, and every composition beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport_core.directories import content_hash, new_directory
from caliport_core.errors import InputError
from export.artifact import Quantization, fill_with

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from calibrate.low_rank import LowRankUpdate
    from export.lean import Lean

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def to_executorch_bundle(
    base: str | Path,
    compositions: Mapping[str, Path],
    out: Path,
    *,
    adapters: Mapping[str, Path] | None = None,
    precision: str = "int4",
    context: int | None = None,
) -> Path:
    """Export one ``.pte`` with a method for each composition over weights stored once.

    ``forward`` is the base alone. A composition that is a linear merge of some of ``adapters`` with
    a correction behind it (LC, LC++) costs its correction; the adapters are stored once, in 8 bits
    where the base is quantized. Any other costs its own rank. A program cannot be added to later:
    ExecuTorch has no way to put a method into a finished one.

    Args:
        base: A Hugging Face directory (or hub name) of a decoder.
        compositions: A PEFT LoRA directory for each method name.
        out: The artifact directory to appear.
        adapters: PEFT LoRA directories of single tasks by name, to be shared.
        precision: Of the base: ``fp32``, ``int8`` or ``int4``.
        context: Tokens of the key-value cache; default the base's own maximum.

    Returns:
        ``out``.

    Raises:
        InputError: Something given is wrong or cannot be exported; nothing is left behind.
    """
    adapters = adapters or {}
    how = Quantization(precision)
    check_names(compositions)
    inputs = {"base": content_hash(Path(base)) if Path(base).exists() else f"name:{base}"}
    inputs |= {f"composition {name}": content_hash(path) for name, path in compositions.items()}
    inputs |= {f"adapter {name}": content_hash(path) for name, path in adapters.items()}
    settings = {"runtime": "executorch", "bundle": True, "precision": precision, "context": context}

    with new_directory(out, "export", inputs, settings) as (partial, extra):

        def lower(decoder: Lean, length: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
            from caliport_core.checkpoints import eos_ids
            from export.bundle import split
            from export.executorch_bundle import lower_bundle

            shared = {name: _fitting(path, decoder) for name, path in adapters.items()}
            return lower_bundle(
                decoder,
                shared,
                {n: split(_fitting(path, decoder), shared) for n, path in compositions.items()},
                partial,
                length,
                eos_ids(decoder.whole),
                tokenizer.bos_token_id,
                None if precision == "fp32" else "int8",
            )

        fill_with(lower, partial, extra, base, "executorch", None, how, context)
    return out


def check_names(compositions: Mapping[str, Path]) -> None:
    """Check the names of compositions, which become names of methods and files.

    Raises:
        InputError: None at all, or a name that is none.
    """
    if not compositions:
        raise InputError("bundle: found no composition, expected at least one NAME=DIR")
    for name in compositions:
        if not _NAME.fullmatch(name) or name == "forward":
            raise InputError(
                f"bundle: found the name {name!r}, expected letters, digits and _ (not forward)"
            )


def _fitting(path: Path, decoder: Lean) -> LowRankUpdate:
    from calibrate.low_rank import LowRankUpdate

    update = LowRankUpdate.from_peft(path)
    update.check_fits(decoder.whole, path)
    return update
