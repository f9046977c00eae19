"""XXX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from caliport.export.quantization.choices import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def eager(base: str | Path, adapter: Path | None, how: Quantization | str) -> PreTrainedModel:
    """The eager model that an artifact is lowered from: W0 + ΔW, quantized by torchao.

    Args:
        base: A Hugging Face directory or hub name.
        adapter: A PEFT LoRA directory or None.
        how: How it is quantized; a precision stands for its defaults.

    Raises:
        InputError: Unknown precision, or a base or adapter that cannot be read or do not fit.
    """
    from caliport.calibrate.peft_files import read_peft
    from caliport.core.checkpoints import load_base
    from caliport.export.decoder.fold import fold
    from caliport.export.quantization.tensors import plan, quantize

    how = Quantization(how) if isinstance(how, str) else how
    update = None if adapter is None else read_peft(adapter)
    model = load_base(base)
    if update is not None and adapter is not None:
        fold(model, update, adapter)
    return quantize(
        model, how.precision, plan(model, how.precision, how.int8_layers, how.embedding_bits)
    )


def reference(
    base: str | Path, adapter: Path | None, how: Quantization | str, runtime: str
) -> PreTrainedModel:
    """The eager model whose logits an artifact should give, rounding while it runs included.

    The two runtimes hold the same integers but quantize activations differently: XNNPACK by
    token, as torchao does; ONNX Runtime by block. An int8 cache rounds keys, values and queries.
    """
    how = Quantization(how) if isinstance(how, str) else how
    model = eager(base, adapter, how)
    if how.cache_bits is not None:
        from caliport.export.reference.int8_cache import round_cache

        round_cache(model)
    if runtime == "executorch" or how.precision == "fp32":
        return model
    from caliport.export.reference import activations

    return activations.reference(model, how.precision)
