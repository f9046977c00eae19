"""One ONNX graph for many compositions: a frozen quantized base and a small file for each.

Beside every linear layer y = W x the graph computes (x Aᵀ) Bᵀ, where A and B are inputs with a
default of rank 0, so that the graph alone is the base. A composition is an ``.onnx_adapter`` file
that holds A and B of the layers it updates; ONNX Runtime puts them in the inputs' place for a run
(``RunOptions.add_active_adapter``), and onnxruntime_genai for a generation
(``Adapters.load``, ``Generator.set_active_adapter``). Ranks may differ by layer and composition.

Source: https://onnxruntime.ai/docs/genai/reference/adapter.html.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport_core.directories import (
    MANIFEST,
    content_hash,
    file_hash,
    new_directory,
    read_manifest,
)
from caliport_core.errors import InputError

if TYPE_CHECKING:
    import onnx_ir

    from calibrate.low_rank import LowRankUpdate
    from export.lean import Lean

ENDING = ".onnx_adapter"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ERRORS_ONLY = 3
_VERSION = 1


def to_onnx_bundle(
    base: str | Path,
    compositions: Mapping[str, Path],
    out: Path,
    *,
    precision: str = "int4",
    context: int | None = None,
    modules: Iterable[str] | None = None,
) -> Path:
    """Quantize a base as it is and write it once, and a small file for each composition.

    Args:
        base: A Hugging Face directory (or hub name) of a decoder.
        compositions: PEFT LoRA directories by the names that the compositions get.
        out: The directory to appear: ``model.onnx``, ``model.onnx.data``, ``genai_config.json``,
            tokenizer files, ``NAME.onnx_adapter`` for each composition, ``manifest.json``.
        precision: Of the base: ``fp32``, ``int8`` or ``int4``. Compositions are float32.
        context: Most tokens; default the base's own maximum.
        modules: Ends of the names of the linear layers that can be updated, such as ``q_proj``.
            None: all in the decoder's layers, so that any composition can be added later. Those
            that ``compositions`` update always can.

    Returns:
        ``out``.

    Raises:
        InputError: Something given is wrong or cannot be exported; nothing is left behind.
    """
    inputs = {"base": content_hash(Path(base)) if Path(base).exists() else f"name:{base}"}
    for name, adapter in compositions.items():
        _check_name(name)
        inputs[f"composition {name}"] = content_hash(adapter)
    ends = None if modules is None else sorted(modules)
    settings = {"runtime": "onnx", "precision": precision, "context": context, "modules": ends}
    with new_directory(out, "bundle", inputs, settings) as (partial, extra):
        fill_bundle(partial, extra, base, compositions, precision, context, ends)
    return out


def add_to_onnx_bundle(bundle: Path, name: str, adapter: Path) -> Path:
    """Add a composition to a finished bundle; the base is neither read nor written.

    Args:
        bundle: A directory made by ``to_onnx_bundle``.
        name: Of the composition; one of that name is replaced.
        adapter: A PEFT LoRA directory for the bundle's base.

    Returns:
        The file, ``bundle/NAME.onnx_adapter``.

    Raises:
        InputError: No bundle, a name that is no file name, or an adapter that cannot be read or
            updates a layer that the bundle has not, or not in that shape. Nothing is changed then.
    """
    from calibrate.low_rank import LowRankUpdate

    _check_name(name)
    manifest = read_manifest(bundle)
    if "bundle" not in manifest:
        raise InputError(f"{bundle}: {MANIFEST} has no `bundle`; expected one for onnx")
    update = LowRankUpdate.from_peft(adapter)
    shapes = {module: tuple(shape) for module, shape in manifest["bundle"]["modules"].items()}
    _check_shapes(update, shapes, adapter, bundle)
    path = bundle / f"{name}{ENDING}"
    partial = bundle / f".{path.name}.partial-{os.getpid()}"
    try:
        write_adapter(update, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    manifest["bundle"]["compositions"][name] = _facts(update, path, content_hash(adapter))
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    text = json.dumps(manifest, indent=2) + "\n"
    partial = bundle / f".{MANIFEST}.partial-{os.getpid()}"
    partial.write_text(text, encoding="utf-8")
    partial.replace(bundle / MANIFEST)
    return path


def fill_bundle(
    directory: Path,
    extra: dict[str, Any],
    base: str | Path,
    compositions: Mapping[str, Path],
    precision: str,
    context: int | None,
    modules: list[str] | None,
) -> None:
    """Write a bundle's files into a directory and its facts into ``extra``."""
    from calibrate.low_rank import LowRankUpdate
    from caliport_core.checkpoints import eos_ids, load_tokenizer
    from export.generation import save_generation_config
    from export.lean import lean
    from export.quantize import scheme
    from export.support import check_exportable
    from export.tokenizer import save_tokenizer

    updates = {name: LowRankUpdate.from_peft(path) for name, path in compositions.items()}

    def length(model: Any) -> int:
        return int(model.config.max_position_embeddings) if context is None else context

    def check(model: Any) -> None:
        check_exportable(model, length(model))
        for name, update in updates.items():
            update.check_fits(model, compositions[name])

    with lean(base, None, precision, directory, check=check) as decoder:
        model = decoder.whole
        tokenizer = load_tokenizer(base, model)
        shapes = _updatable(decoder, modules, updates.values())
        lowered = lower_bundle(decoder, directory, length(model), tokenizer, shapes)
    save_tokenizer(tokenizer, directory)
    save_generation_config(base, model.config, directory, eos_ids(model), tokenizer.bos_token_id)
    facts = {}
    for name, update in updates.items():
        path = directory / f"{name}{ENDING}"
        write_adapter(update, path)
        facts[name] = _facts(update, path, content_hash(compositions[name]))
    extra |= {
        "runtime": "onnx",
        "precision": precision,
        "context": length(model),
        "scheme": scheme(precision),
        "lowering": lowered,
        "bundle": {"modules": shapes, "compositions": facts},
    }


def lower_bundle(
    decoder: Lean,
    directory: Path,
    context: int,
    tokenizer: Any,
    modules: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """Write the base with its low-rank inputs; files as those of ``export.onnx.lower``.

    Args:
        decoder: The base's weights as they ship.
        directory: Where to; must exist.
        context: Most tokens, prompt and answer together.
        tokenizer: See ``export.onnx.lower``.
        modules: (out, in) of the linear layers that can be updated, by name.

    Returns:
        Manifest entries.
    """
    from export import onnx

    program = onnx.graph_of(decoder, context, lambda graph: add_terms(graph, modules))
    onnx.save(program, decoder, directory)
    config = onnx.genai_config(decoder.whole, context, tokenizer, None)
    # ONNX Runtime 1.31 warns of every input with a default while it loads.
    config["model"]["decoder"]["session_options"]["log_severity_level"] = _ERRORS_ONLY
    (directory / onnx.GENAI_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return onnx.describe(program, decoder)


def add_terms(graph: onnx_ir.Graph, modules: Mapping[str, tuple[int, int]]) -> None:
    """Add (x Aᵀ) Bᵀ to the outputs of linear layers, in place.

    Aᵀ [in, rank] and Bᵀ [rank, out] are inputs ``NAME.lora_A`` and ``NAME.lora_B`` with an empty
    default.

    Raises:
        InputError: A module has no product of its own in the graph.
    """
    import onnx_ir as ir

    left = dict(modules)
    for node in list(graph):
        if node.op_type not in ("MatMulNBits", "FusedMatMul") or node.name not in left:
            continue
        rows, columns = left.pop(node.name)
        out = node.outputs[0]
        down = _factor(graph, f"{node.name}.lora_A", (columns, None))
        up = _factor(graph, f"{node.name}.lora_B", (None, rows))
        inner = ir.node("MatMul", [node.inputs[0], down], name=f"{node.name}.down")
        outer = ir.node("MatMul", [inner.outputs[0], up], name=f"{node.name}.up")
        total = ir.node("Add", [out, outer.outputs[0]], name=f"{node.name}.sum")
        for new in (inner, outer, total):
            new.outputs[0].name, new.outputs[0].type = f"{new.name}.out", out.type
        assert out.shape is not None
        inner.outputs[0].shape = ir.Shape([*out.shape[:-1], f"{node.name}.rank"])
        outer.outputs[0].shape = total.outputs[0].shape = out.shape
        ir.convenience.replace_all_uses_with(out, total.outputs[0], replace_graph_outputs=True)
        total.replace_input_with(0, out)
        graph.insert_after(node, [inner, outer, total])
    if left:
        raise InputError(
            f"{next(iter(left))}: no product of its own in the graph, so it cannot be updated by "
            "an onnx bundle"
        )


def _factor(graph: onnx_ir.Graph, name: str, shape: tuple[int | None, int | None]) -> onnx_ir.Value:
    import numpy as np
    import onnx_ir as ir

    rank = f"{name.rpartition('.')[0]}.rank"
    value = ir.Value(
        name=name,
        shape=ir.Shape([rank if size is None else size for size in shape]),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(np.zeros([size or 0 for size in shape], np.float32), name=name),
    )
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value


def write_adapter(update: LowRankUpdate, path: Path) -> None:
    """Write a composition as ONNX Runtime's adapter file, float32.

    Raises:
        InputError: ONNX Runtime cannot write it.
    """
    from onnxruntime import AdapterFormat, OrtValue

    values = {}
    for name in update.modules:
        for key, factor in (("lora_A", update.a[name]), ("lora_B", update.b[name])):
            content = factor.float().T.contiguous().numpy()
            values[f"{name}.{key}"] = OrtValue.ortvalue_from_numpy(content)
    made = AdapterFormat()
    made.set_adapter_version(_VERSION)
    made.set_model_version(_VERSION)
    made.set_parameters(values)
    made.export_adapter(str(path))


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(
            f"composition {name!r}: expected a name of letters, digits, `.`, `_` and `-`"
        )


def _check_shapes(
    update: LowRankUpdate, shapes: Mapping[str, tuple[int, ...]], adapter: Path, bundle: Path
) -> None:
    for module in update.modules:
        found, expected = update.shape(module), shapes.get(module)
        if expected is None:
            raise InputError(
                f"{adapter}: updates {module}, which {bundle} cannot; expected one of its "
                f"{len(shapes)} layers (`bundle.modules` in {MANIFEST})"
            )
        if found != expected:
            raise InputError(
                f"{adapter}: {module} updates a {list(found)} weight, {bundle} has "
                f"{list(expected)}; the adapter was made for another base"
            )


def _updatable(
    decoder: Lean, ends: Iterable[str] | None, updates: Iterable[LowRankUpdate]
) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers that get low-rank terms, in the model's order."""
    from torch import nn

    from export.lean import every

    layers = every(decoder)
    updated = {name for update in updates for name in update.modules}
    linears = {n: m for n, m in decoder.whole.named_modules() if isinstance(m, nn.Linear)}
    if ends is None:
        wanted = {name for name in linears if layers.index(name) is not None}
    else:
        wanted = {name for name in linears for end in ends if f".{name}".endswith(f".{end}")}
        missing = [end for end in ends if not any(f".{n}".endswith(f".{end}") for n in linears)]
        if missing:
            raise InputError(f"modules: {missing[0]} ends the name of no linear layer of the base")
    return {
        name: (module.out_features, module.in_features)
        for name, module in linears.items()
        if name in wanted | updated
    }


def _facts(update: LowRankUpdate, path: Path, source: str) -> dict[str, Any]:
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "modules": len(update.modules),
        "parameters": update.parameter_count,
        "adapter": source,
    }
