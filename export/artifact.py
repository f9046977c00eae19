"""From a base and an adapter to one artifact directory, and to its eager references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport_core.directories import content_hash, new_directory
from caliport_core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from export.lean import Lean

RUNTIMES = ("executorch", "onnx")
PRECISIONS = ("fp32", "int8", "int4")


@dataclass(frozen=True)
class Quantization:
    """How a decoder is quantized.

    Attributes:
        precision: One of ``PRECISIONS``.
        int8_layers: Linear layers that ``int4`` keeps at 8 bits.
        embedding_bits: 4 or 8; None: as many as a tied head has, else 8.
        cache_bits: 8 for keys and values in int8, None for float32.
    """

    precision: str
    int8_layers: tuple[str, ...] = ()
    embedding_bits: int | None = None
    cache_bits: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            listed = ", ".join(PRECISIONS)
            raise InputError(f"precision: found {self.precision!r}, expected one of {listed}")
        if self.cache_bits not in (None, 8):
            raise InputError(f"cache_bits: found {self.cache_bits}, expected 8 or none")

    def choices(self) -> dict[str, Any]:
        """What is chosen beside the precision, for a manifest."""
        return {
            "int8_layers": list(self.int8_layers),
            "embedding_bits": self.embedding_bits,
            "cache_bits": self.cache_bits,
        }

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Quantization:
        """What an artifact's manifest says of it."""
        choices = manifest.get("quantization", {})
        return cls(
            manifest["precision"],
            tuple(choices.get("int8_layers", ())),
            choices.get("embedding_bits"),
            choices.get("cache_bits"),
        )


def to_executorch(
    base: str | Path,
    out: Path,
    *,
    adapter: Path | None = None,
    precision: str = "fp32",
    context: int | None = None,
    int8_layers: Sequence[str] = (),
    embedding_bits: int | None = None,
    cache_bits: int | None = None,
) -> Path:
    """Fold an adapter into a base, quantize, and lower to ExecuTorch with XNNPACK.

    Args:
        base: A Hugging Face directory (or hub name) of a decoder.
        out: The artifact directory to appear: ``model.pte``, tokenizer files, generation settings,
            a model card and ``manifest.json``. One that is there already is replaced.
        adapter: A PEFT LoRA directory; None exports the base alone.
        precision: ``fp32``, ``int8`` or ``int4``; the manifest says the exact scheme.
        context: Tokens of the key-value cache; default the base's own maximum.
        int8_layers: Linear layers that ``int4`` keeps at 8 bits, by name (``export.sensitivity``).
        embedding_bits: 4 or 8; default as many as a tied head has, then stored once, else 8.
        cache_bits: 8: keys and values are int8 in the cache, by token and head; default float32.

    Returns:
        ``out``.

    Raises:
        InputError: Something given is wrong or cannot be exported; nothing is left behind.

    Example:
        ::

            from pathlib import Path
            from export import to_executorch
            from validation.executorch_runner import ExecuTorchRunner

            out = to_executorch(
                "models/my-base",
                Path("artifacts/summarize"),
                adapter=Path("adapters/summarize"),
                precision="int4",
                context=2048,
            )
            logits = ExecuTorchRunner(out).prefill([1, 42, 17])  # float32 [vocab]
    """
    how = Quantization(precision, tuple(int8_layers), embedding_bits, cache_bits)
    return _export(base, out, "executorch", adapter, how, context)


def to_onnx(
    base: str | Path,
    out: Path,
    *,
    adapter: Path | None = None,
    precision: str = "fp32",
    context: int | None = None,
    int8_layers: Sequence[str] = (),
    embedding_bits: int | None = None,
) -> Path:
    """Fold an adapter into a base, quantize, and lower to ONNX for ONNX Runtime.

    Args:
        base: A Hugging Face directory (or hub name) of a decoder.
        out: The artifact directory to appear: ``model.onnx``, ``model.onnx.data``,
            ``genai_config.json``, tokenizer files, generation settings, a model card and
            ``manifest.json``. One that is there already is replaced.
        adapter: A PEFT LoRA directory; None exports the base alone.
        precision: ``fp32``, ``int8`` or ``int4``; the manifest says the exact scheme.
        context: Most tokens, prompt and answer together; default the base's own maximum.
        int8_layers: Linear layers that ``int4`` keeps at 8 bits, by name (``export.sensitivity``).
        embedding_bits: 4 or 8; default as many as a tied head has, then stored once, else 8.

    Returns:
        ``out``.

    Raises:
        InputError: Something given is wrong or cannot be exported; nothing is left behind.

    Example:
        ::

            from pathlib import Path
            import onnxruntime_genai as genai
            from export import to_onnx

            out = to_onnx(
                "models/my-base",
                Path("artifacts/summarize"),
                adapter=Path("adapters/summarize"),
                precision="int4",
                context=2048,
            )
            model = genai.Model(str(out))
    """
    how = Quantization(precision, tuple(int8_layers), embedding_bits)
    return _export(base, out, "onnx", adapter, how, context)


def _export(
    base: str | Path,
    out: Path,
    runtime: str,
    adapter: Path | None,
    how: Quantization,
    context: int | None,
) -> Path:
    inputs = {"base": content_hash(Path(base)) if Path(base).exists() else f"name:{base}"}
    if adapter is not None:
        inputs["adapter"] = content_hash(adapter)
    settings = {"runtime": runtime, "context": context, **asdict(how)}
    with new_directory(out, "export", inputs, settings) as (partial, extra):
        fill(partial, extra, base, runtime, adapter, how, context)
    return out


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
    from caliport_core.checkpoints import eos_ids

    def lower(decoder: Lean, length: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        if runtime == "executorch":
            from export import executorch

            ends = eos_ids(decoder.whole)
            return executorch.lower(decoder, directory, length, ends, tokenizer.bos_token_id)
        from export import onnx

        return onnx.lower(decoder, directory, length, tokenizer)

    fill_with(lower, directory, extra, base, runtime, adapter, how, context)


def fill_with(
    lower: Callable[[Lean, int, PreTrainedTokenizerBase], dict[str, Any]],
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
    from caliport_core.checkpoints import eos_ids, load_tokenizer
    from export.cache import SCHEME, check_cache_bits
    from export.card import describe, write_card
    from export.generation import save_generation_config
    from export.lean import lean
    from export.quantize import scheme
    from export.support import check_exportable
    from export.tokenizer import save_tokenizer

    def length(model: PreTrainedModel) -> int:
        return int(model.config.max_position_embeddings) if context is None else context

    def check(model: PreTrainedModel) -> None:
        check_exportable(model, length(model))
        check_cache_bits(how, runtime, model.config)

    with lean(base, adapter, how, directory, check=check) as decoder:
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


def eager(base: str | Path, adapter: Path | None, how: Quantization | str) -> PreTrainedModel:
    """The eager model that an artifact is lowered from: W0 + ΔW, quantized by torchao.

    Args:
        base: A Hugging Face directory or hub name.
        adapter: A PEFT LoRA directory or None.
        how: How it is quantized; a precision stands for its defaults.

    Raises:
        InputError: Unknown precision, or a base or adapter that cannot be read or do not fit.
    """
    from calibrate.low_rank import LowRankUpdate
    from caliport_core.checkpoints import load_base
    from export.fold import fold
    from export.quantize import plan, quantize

    how = Quantization(how) if isinstance(how, str) else how
    update = None if adapter is None else LowRankUpdate.from_peft(adapter)
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
        from export.cache import round_cache

        round_cache(model)
    if runtime == "executorch" or how.precision == "fp32":
        return model
    from export import activations

    return activations.reference(model, how.precision)
