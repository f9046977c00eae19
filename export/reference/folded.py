"""Eager models of a folded artifact: the one it is lowered from, and its reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from caliport.export.quantization.choices import Quantization
from caliport.export.runtime import Rounding, get

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from caliport.export.quantization.tensors import KnownIntegers


def eager(
    base: str | Path,
    adapter: Path | None,
    how: Quantization | str,
    known: KnownIntegers | None = None,
) -> PreTrainedModel:
    """The eager model that an artifact is lowered from: W0 + ΔW, quantized by torchao.

    Args:
        base: A Hugging Face directory or hub name.
        adapter: A PEFT LoRA directory or None.
        how: How it is quantized; a precision stands for its defaults.
        known: Integers to take in place of quantizing, as those that an artifact holds.

    Raises:
        InputError: Unknown precision, a base or adapter that cannot be read, or an adapter that
            does not fit the base.
    """
    from caliport.export.decoder.fold import load_folded
    from caliport.export.quantization.tensors import plan_of, quantize

    how = Quantization(how) if isinstance(how, str) else how
    model = load_folded(base, adapter)
    forms = plan_of(model, how)
    return quantize(model, how.precision, forms, known)


def reference(
    base: str | Path,
    adapter: Path | None,
    how: Quantization | str,
    runtime: str,
    rounding: Rounding | None = None,
    known: KnownIntegers | None = None,
) -> PreTrainedModel:
    """The eager model whose logits an artifact should reproduce, including activation rounding.

    All runtimes have the same integers but round the inputs of quantized products differently
    (``Runtime.rounding``). An int8 cache rounds keys, values and queries.

    Args:
        base: A Hugging Face directory or hub name.
        adapter: A PEFT LoRA directory or None.
        how: How it is quantized; a precision stands for its defaults.
        runtime: Name of the runtime.
        rounding: How activations are rounded; default as the runtime does.
        known: As for ``eager``.

    Raises:
        InputError: For the same reasons as ``eager``.
    """
    how = Quantization(how) if isinstance(how, str) else how
    model = eager(base, adapter, how, known)
    if how.cache_bits is not None:
        from caliport.export.reference.int8_cache import round_cache

        round_cache(model)
    if how.precision == "fp32":
        return model
    from caliport.export.reference.activations import by_token, in_blocks

    if (rounding or get(runtime).rounding) == "token":
        return by_token(model)
    return in_blocks(model, how.precision)
