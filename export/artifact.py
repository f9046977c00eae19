"""From a base and an adapter to one artifact directory, and to its eager references."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.export.quantization.choices import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from caliport.export.decoder.shipped import ShippedDecoder


def fill(
    directory: Path,
    extra: dict[str, Any],
    base: str | Path,
    runtime: str,
    adapter: Path | None,
    how: Quantization,
    context: int | None,
) -> None:
    """Write an artifact's files into a directory and its facts into ``extra``."""
    from caliport.core.checkpoints import eos_ids

    def lower(
        decoder: ShippedDecoder, length: int, tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Any]:
        if runtime == "executorch":
            from caliport.export.executorch import lower as executorch

            ends = eos_ids(decoder.whole)
            return executorch.lower(decoder, directory, length, ends, tokenizer.bos_token_id)
        from caliport.export.onnx import lower as onnx

        return onnx.lower(decoder, directory, length, tokenizer)

    fill_with(lower, directory, extra, base, runtime, adapter, how, context)


def fill_with(
    lower: Callable[[ShippedDecoder, int, PreTrainedTokenizerBase], dict[str, Any]],
    directory: Path,
    extra: dict[str, Any],
    base: str | Path,
    runtime: str,
    adapter: Path | None,
    how: Quantization,
    context: int | None,
) -> None:
    """What every artifact has beside its program: tokenizer, settings, facts, card.

    Args:
        lower: Writes the program; is given the decoder, the context and the tokenizer and returns
            the manifest's entries about it.
        directory: Where to.
        extra: Takes the manifest's entries.
        base: A Hugging Face directory or hub name.
        runtime: One of ``RUNTIMES``.
        adapter: What is folded in, or None.
        how: How the base is quantized.
        context: Tokens of the cache; None for the base's own maximum.
    """
    from caliport.core.checkpoints import eos_ids, load_tokenizer
    from caliport.export.decoder.checks import check_exportable
    from caliport.export.decoder.shipped import shipped_decoder
    from caliport.export.package.card import describe, write_card
    from caliport.export.package.generation import save_generation_config
    from caliport.export.package.tokenizer import save_tokenizer
    from caliport.export.quantization.cache import SCHEME, check_cache_bits
    from caliport.export.quantization.tensors import scheme

    def length(model: PreTrainedModel) -> int:
        return int(model.config.max_position_embeddings) if context is None else context

    def check(model: PreTrainedModel) -> None:
        check_exportable(model, length(model))
        check_cache_bits(how, runtime, model.config)

    with shipped_decoder(base, adapter, how, directory, check=check) as decoder:
        model = decoder.whole
        tokenizer = load_tokenizer(base, model)
        lowered = lower(decoder, length(model), tokenizer)
        sizes = decoder.sizes()
    save_tokenizer(tokenizer, directory)
    save_generation_config(base, model.config, directory, eos_ids(model), tokenizer.bos_token_id)
    extra |= {
        "runtime": runtime,
        "precision": how.precision,
        "context": length(model),
        "scheme": scheme(how.precision) | ({"cache": SCHEME} if how.cache_bits else {}),
        "quantization": how.choices(),
        "sizes": sizes,
        "lowering": lowered,
        **describe(base, model.config, adapter),
    }
    write_card(directory, extra)
