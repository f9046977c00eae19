"""XXX."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from caliport.core.directories import content_hash, new_directory
from caliport.export.artifact import fill
from caliport.export.bundle import bundle_inputs, bundle_settings, check_names, hashed
from caliport.export.executorch.bundle import fill_bundle as fill_executorch_bundle
from caliport.export.onnx.bundle import fill_bundle as fill_onnx_bundle
from caliport.export.onnx.lower import check_name
from caliport.export.quantization.choices import Quantization


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
        int8_layers: Linear layers that ``int4`` keeps at 8 bits, by name
            (``caliport.export.quantization.sensitivity``).
        embedding_bits: 4 or 8; default as many as a tied head has, then stored once, else 8.
        cache_bits: 8: keys and values are int8 in the cache, by token and head; default float32.

    Returns:
        ``out``.

    Raises:
        InputError: Something given is wrong or cannot be exported; nothing is left behind.

    Example:
        ::

            from pathlib import Path
            from caliport.export import to_executorch
            from caliport.validation.runners.executorch import ExecuTorchRunner

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
        int8_layers: Linear layers that ``int4`` keeps at 8 bits, by name
            (``caliport.export.quantization.sensitivity``).
        embedding_bits: 4 or 8; default as many as a tied head has, then stored once, else 8.

    Returns:
        ``out``.

    Raises:
        InputError: Something given is wrong or cannot be exported; nothing is left behind.

    Example:
        ::

            from pathlib import Path
            import onnxruntime_genai as genai
            from caliport.export import to_onnx

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


def to_executorch_bundle(
    base: str | Path,
    compositions: Mapping[str, Path],
    out: Path,
    *,
    adapters: Mapping[str, Path] | None = None,
    precision: str = "int4",
    context: int | None = None,
    int8_layers: Sequence[str] = (),
    embedding_bits: int | None = None,
    cache_bits: int | None = None,
) -> Path:
    """Export one ``.pte`` with a method for each composition over weights stored once.

    ``forward`` is the base alone. A composition that is a linear merge of some of ``adapters`` with
    a correction behind it (LC, LC++) costs its correction; the adapters are stored once, in 8 bits
    where the base is quantized. Any other costs its own rank; what is a composition's own has 16
    bits then. A program cannot be added to later: ExecuTorch has no way to put a method into a
    finished one.

    Args:
        base: A Hugging Face directory (or hub name) of a decoder.
        compositions: A PEFT LoRA directory for each method name: letters, digits and ``_``, not
            ``forward``; at least one.
        out: The artifact directory to appear: ``model.pte``, tokenizer files, generation settings,
            a model card and ``manifest.json``. One that is there already is replaced.
        adapters: PEFT LoRA directories of single tasks by name, to be shared. Those that no
            composition stands on are left out.
        precision: Of the base: ``fp32``, ``int8`` or ``int4``.
        context: Tokens of the key-value cache; default the base's own maximum.
        int8_layers: Linear layers that ``int4`` keeps at 8 bits, by name
            (``caliport.export.quantization.sensitivity``).
        embedding_bits: 4 or 8; default as many as a tied head has, then stored once, else 8.
        cache_bits: 8: keys and values are int8 in the cache, by token and head; default float32.

    Returns:
        ``out``.

    Raises:
        InputError: Something given is wrong or cannot be exported; nothing is left behind.

    Example:
        ::

            from pathlib import Path
            from caliport.export import to_executorch_bundle
            from caliport.validation.runners.executorch import ExecuTorchRunner

            out = to_executorch_bundle(
                "models/my-base",
                {"summarize_es": Path("composed/summarize_es")},
                Path("artifacts/bundle"),
                adapters={"summarize": Path("adapters/summarize"), "es": Path("adapters/es")},
                context=2048,
            )
            runner = ExecuTorchRunner(out, method="summarize_es")
            logits = runner.prefill([1, 42, 17])  # float32 [vocab]
    """
    adapters = adapters or {}
    how = Quantization(precision, tuple(int8_layers), embedding_bits, cache_bits)
    check_names("executorch", compositions)
    inputs = hashed(bundle_inputs(base, compositions, adapters))
    settings = bundle_settings("executorch", how, context)
    with new_directory(out, "export", inputs, settings) as (partial, extra):
        fill_executorch_bundle(partial, extra, base, compositions, adapters, how, context)
    return out


def to_onnx_bundle(
    base: str | Path,
    compositions: Mapping[str, Path],
    out: Path,
    *,
    precision: str = "int4",
    context: int | None = None,
    int8_layers: Sequence[str] = (),
    embedding_bits: int | None = None,
    modules: Iterable[str] | None = None,
) -> Path:
    """Quantize a base as it is and write it once, and a small file for each composition.

    Args:
        base: A Hugging Face directory (or hub name) of a decoder.
        compositions: PEFT LoRA directories by the names that the compositions get: letters,
            digits, ``.``, ``_`` and ``-``. None at all is fine; they can be added later.
        out: The directory to appear: ``model.onnx``, ``model.onnx.data``, ``genai_config.json``,
            tokenizer files, generation settings, a model card, ``NAME.onnx_adapter`` for each
            composition, ``manifest.json``. One that is there already is replaced.
        precision: Of the base: ``fp32``, ``int8`` or ``int4``. Compositions are float32.
        context: Most tokens, prompt and answer together; default the base's own maximum.
        int8_layers: Linear layers that ``int4`` keeps at 8 bits, by name
            (``caliport.export.quantization.sensitivity``).
        embedding_bits: 4 or 8; default as many as a tied head has, then stored once, else 8.
        modules: Ends of the names of the linear layers that can be updated, such as ``q_proj``.
            None: all in the decoder's layers, so that any composition can be added later. Those
            that ``compositions`` update always can.

    Returns:
        ``out``.

    Raises:
        InputError: Something given is wrong or cannot be exported; nothing is left behind.

    Example:
        ::

            from pathlib import Path
            import onnxruntime_genai as genai
            from caliport.export import to_onnx_bundle

            out = to_onnx_bundle(
                "models/my-base",
                {"summarize_es": Path("composed/summarize_es")},
                Path("artifacts/bundle"),
                context=2048,
            )
            model = genai.Model(str(out))
            adapters = genai.Adapters(model)
            adapters.load(str(out / "summarize_es.onnx_adapter"), "summarize_es")
            # then, of a genai.Generator: generator.set_active_adapter(adapters, "summarize_es")
    """
    how = Quantization(precision, tuple(int8_layers), embedding_bits)
    for name in compositions:
        check_name(name)
    inputs = hashed(bundle_inputs(base, compositions, {}))
    ends = None if modules is None else sorted(modules)
    settings = bundle_settings("onnx", how, context)
    settings |= {} if ends is None else {"modules": ends}
    with new_directory(out, "export", inputs, settings) as (partial, extra):
        fill_onnx_bundle(partial, extra, base, compositions, how, context, ends)
    return out
