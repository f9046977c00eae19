"""The public functions: ``export`` makes an artifact, ``add_composition`` extends a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from caliport.core.outputs import forced
from caliport.export.artifact import Artifact
from caliport.export.make import make
from caliport.export.quantization.choices import Goal, Quantization
from caliport.export.quantization.text import CalibrationText
from caliport.export.request import Bundle, Request

Directory = str | Path


def export(
    base: Directory,
    out: Directory,
    *,
    runtime: str,
    adapter: Directory | None = None,
    precision: str | Quantization = "fp32",
    context: int | None = None,
    bundle: Bundle | Mapping[str, Directory] | None = None,
    text: CalibrationText | None = None,
    goal: Goal | None = None,
    force: bool = False,
) -> Artifact:
    """Quantize a base, with an adapter folded in or compositions beside it, and lower it.

    Args:
        base: A Hugging Face directory (or hub name) of a decoder.
        out: The artifact directory to write: the program, tokenizer files, generation settings, a
            model card and ``manifest.json``. An earlier artifact is replaced.
        runtime: ``executorch`` writes ``model.pte`` for XNNPACK; ``onnx`` writes ``model.onnx``,
            ``model.onnx.data`` and ``genai_config.json`` for ONNX Runtime on CPU.
        adapter: A PEFT LoRA directory to fold in; None exports only the base.
        precision: ``fp32``, ``int8`` or ``int4``, or a ``Quantization`` for finer choices: layers
            that ``int4`` keeps at 8 bits, bits of the embedding and of the key-value cache. The
            manifest records the exact scheme.
        context: Length of the key-value cache in tokens, prompt and answer together; default the
            base's maximum.
        bundle: PEFT LoRA directories by name, or a ``Bundle``. The base is quantized without any
            adapter and stored once. For ``executorch`` each composition is a method of the program
            over the same weights, and adapters that several compositions contain are stored once;
            a finished program cannot be extended. For ``onnx`` each composition is a small
            ``.onnx_adapter`` file, and ``add_composition`` adds more.
        text: Calibration text for a quantizer that measures what layers are fed, such as
            ``Quantization("int4", quantizer="gptq")``.
        goal: A size or a divergence from float that decides how many layers of ``int4`` stay at 8
            bits; needs ``text``.
        force: Replace ``out`` even if caliport did not make it; an input is never replaced.

    Returns:
        The artifact at ``out``.

    Raises:
        InputError: Invalid input, or a model that cannot be exported; no partial output remains.

    Example:
        ::

            import caliport

            artifact = caliport.export(
                "models/my-base",
                "artifacts/summarize",
                runtime="executorch",
                adapter="adapters/summarize",
                precision="int4",
                context=2048,
            )
            logits = caliport.load(artifact).prefill([1, 42, 17])  # float32 [vocab]
    """
    how = precision if isinstance(precision, Quantization) else Quantization(precision)
    if bundle is not None and not isinstance(bundle, Bundle):
        bundle = Bundle({name: Path(path) for name, path in bundle.items()})
    folded = None if adapter is None else Path(adapter)
    with forced(force):
        make(Request(base, runtime, how, context, folded, bundle, text, goal), Path(out))
    return Artifact.read(out)


def add_composition(bundle: Directory, name: str, adapter: Directory) -> Path:
    """Add a composition to a finished ``onnx`` bundle; the base is neither read nor written.

    Args:
        bundle: The bundle's directory.
        name: Name of the composition; an existing one of that name is replaced.
        adapter: A PEFT LoRA directory for the bundle's base.

    Returns:
        The file, ``bundle/NAME.onnx_adapter``.

    Raises:
        InputError: Not a bundle or one that cannot be extended, a name that cannot be a file name,
            or an adapter that cannot be read or does not fit. The bundle is then unchanged.
    """
    from caliport.export.onnx.bundle import add_composition as add

    return add(Path(bundle), name, Path(adapter))
