"""A bundle's directory: one quantized base, and every composition beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport_core.directories import content_hash, new_directory
from caliport_core.errors import InputError
from export.artifact import Quantization, fill_with

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
            from export import to_executorch_bundle
            from validation.executorch_runner import ExecuTorchRunner

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
        fill_bundle(partial, extra, base, compositions, adapters, how, context)
    return out


def bundle_inputs(
    base: str | Path, compositions: Mapping[str, Path], adapters: Mapping[str, Path]
) -> dict[str, Path | str]:
    """What a bundle is made from, by the labels in its manifest."""
    inputs: dict[str, Path | str] = {"base": base}
    inputs |= {f"composition {name}": path for name, path in compositions.items()}
    return inputs | {f"adapter {name}": path for name, path in adapters.items()}


def hashed(inputs: Mapping[str, Path | str]) -> dict[str, str]:
    """Content hashes of inputs; a name that is no path, such as one on a hub, stands for itself."""
    return {
        label: content_hash(Path(path)) if Path(path).exists() else f"name:{path}"
        for label, path in inputs.items()
    }


def bundle_settings(runtime: str, how: Quantization, context: int | None) -> dict[str, Any]:
    """What decides a bundle beside its inputs, for its manifest."""
    return {"runtime": runtime, "bundle": True, "context": context, **asdict(how)}


def fill_bundle(
    directory: Path,
    extra: dict[str, Any],
    base: str | Path,
    compositions: Mapping[str, Path],
    adapters: Mapping[str, Path],
    how: Quantization,
    context: int | None,
) -> None:
    """Write a bundle for ExecuTorch into a directory and its facts into ``extra``."""
    from export.bundle import read_updates, shared_form, split

    single = read_updates(base, adapters)
    composed = {n: split(u, single) for n, u in read_updates(base, compositions).items()}
    used = {name for parts in composed.values() for name in parts.adapters}
    single = {name: update for name, update in single.items() if name in used}

    def lower(decoder: Lean, length: int, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        from caliport_core.checkpoints import eos_ids
        from export.card import describe_adapter
        from export.executorch_bundle import lower_bundle

        lowered = lower_bundle(
            decoder,
            single,
            composed,
            directory,
            length,
            eos_ids(decoder.whole),
            tokenizer.bos_token_id,
            shared_form(how.precision),
        )
        sizes = lowered["sizes"]
        extra["bundle"] = {
            "adapters": {name: {"bytes": size} for name, size in sizes["adapters"].items()},
            "compositions": {
                name: {
                    "bytes": sizes["compositions"][name],
                    "stands_on": list(composed[name].adapters),
                    "lora": describe_adapter(path),
                }
                for name, path in compositions.items()
            },
        }
        return lowered

    fill_with(lower, directory, extra, base, "executorch", None, how, context)


def check_names(runtime: str, compositions: Mapping[str, Path]) -> None:
    """Check the names of compositions, which become names of methods or files.

    Raises:
        InputError: None at all, or a name that is none.
    """
    if not compositions:
        raise InputError("bundle: found no composition, expected at least one NAME=DIR")
    for name in compositions:
        if runtime == "executorch" and not is_method(name):
            raise InputError(
                f"bundle: found the name {name!r}, expected letters, digits and _ (not forward)"
            )
        if runtime == "onnx":
            from export.onnx_bundle import check_name

            check_name(name)


def is_method(name: str) -> bool:
    """Whether a composition can have a method of this name in a ``.pte``."""
    return _NAME.fullmatch(name) is not None and name != "forward"
