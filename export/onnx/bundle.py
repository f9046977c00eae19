"""One ONNX graph for many compositions: a frozen quantized base and a small file for each.

Beside every linear layer y = W x the graph computes (x Aᵀ) Bᵀ, where A and B are inputs with a
default of rank 0, so the graph without an adapter is the base. A composition is an
``.onnx_adapter`` file with A and B of the layers it updates; ONNX Runtime passes them as inputs for
a run (``RunOptions.add_active_adapter``), and onnxruntime_genai for a generation
(``Adapters.load``, ``Generator.set_active_adapter``). Ranks may differ by layer and composition.

Source: https://onnxruntime.ai/docs/genai/reference/adapter.html.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.directories import (
    MANIFEST,
    content_hash,
    file_hash,
    read_manifest,
)
from caliport.core.errors import InputError
from caliport.core.places import replacing
from caliport.core.processes import alone
from caliport.export.artifact import Artifact
from caliport.export.onnx.files import GENAI_CONFIG

if TYPE_CHECKING:
    import onnx_ir
    from transformers import PreTrainedTokenizerBase

    from caliport.calibrate.low_rank import LowRankUpdate
    from caliport.export.decoder.shipped import ShippedDecoder
    from caliport.export.request import Request

ENDING = ".onnx_adapter"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ERRORS_ONLY = 3
_VERSION = 1


def add_composition(bundle: Path, name: str, adapter: Path) -> Path:
    """Add a composition to a finished bundle; the base is neither read nor written.

    Args:
        bundle: A bundle for ONNX.
        name: Name of the composition; an existing one of that name is replaced.
        adapter: A PEFT LoRA directory for the bundle's base.

    Returns:
        The file, ``bundle/NAME.onnx_adapter``.

    Raises:
        InputError: Not a bundle or one for ExecuTorch, files that its manifest does not record, a
            name that cannot be a file name, or an adapter that cannot be read or updates a layer
            that the bundle does not have in that shape. The bundle is then unchanged.
    """
    with alone(bundle):
        return _added(bundle, name, adapter)


def _added(bundle: Path, name: str, adapter: Path) -> Path:
    check_name(name)
    artifact = Artifact.read(bundle)
    if artifact.runtime != "onnx":
        raise InputError(
            f"{bundle}: a .pte cannot be added to; export the bundle again with all compositions"
        )
    if not artifact.is_bundle:
        raise InputError(f"{bundle}: {MANIFEST} has no `bundle`; expected one for onnx")
    artifact.check()
    manifest = read_manifest(bundle)
    if "modules" not in manifest["bundle"] or "compositions" not in manifest["bundle"]:
        raise InputError(
            f"{bundle / MANIFEST}: bundle lacks `modules` or `compositions`; export it again"
        )
    from caliport.calibrate.peft_files import read_peft

    update = read_peft(adapter)
    shapes = {module: tuple(shape) for module, shape in manifest["bundle"]["modules"].items()}
    _check_shapes(update, shapes, adapter, bundle)
    path = bundle / f"{name}{ENDING}"
    if path.is_symlink() or (path.exists() and path.name not in manifest["files"]):
        raise InputError(f"{path}: was not made by caliport and would be lost; move it elsewhere")
    with replacing(path) as beside:
        write_adapter(update, beside)
    manifest["bundle"]["compositions"][name] = _facts(update, path, adapter)
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    text = json.dumps(manifest, indent=2) + "\n"
    with replacing(bundle / MANIFEST) as beside:
        beside.write_text(text, encoding="utf-8")
    return path


def lower_request(
    decoder: ShippedDecoder,
    directory: Path,
    request: Request,
    context: int,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Write a bundle for ONNX; arguments and result are those of ``Runtime.lower``."""
    from caliport.export.decoder.terms import read_updates

    bundle = request.bundle
    assert bundle is not None
    updates = read_updates(request.base, bundle.compositions)
    shapes = _updatable(decoder, bundle.modules, updates.values())
    lowered = lower_bundle(decoder, directory, context, tokenizer, shapes)
    facts = {}
    for name, update in updates.items():
        path = directory / f"{name}{ENDING}"
        write_adapter(update, path)
        facts[name] = _facts(update, path, bundle.compositions[name])
    return {"bundle": {"modules": shapes, "compositions": facts}, "lowering": lowered}


def lower_bundle(
    decoder: ShippedDecoder,
    directory: Path,
    context: int,
    tokenizer: Any,
    modules: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """Write the base with low-rank inputs, in the files of ``caliport.export.onnx.lower.lower``.

    Args:
        decoder: The base and its weights as they ship.
        directory: Where to write; must exist.
        context: Maximum number of tokens, prompt and answer together.
        tokenizer: See ``caliport.export.onnx.lower.lower``.
        modules: (out, in) of the linear layers that can be updated, by name.

    Returns:
        Manifest entries.
    """
    from caliport.export.onnx import lower as onnx

    program = onnx.graph_of(decoder, context, lambda graph: add_terms(graph, modules))
    onnx.save(program, decoder, directory)
    config = onnx.genai_config(decoder.whole, context, tokenizer)
    # ONNX Runtime 1.31 warns about every input with a default while it loads the graph.
    config["model"]["decoder"]["session_options"]["log_severity_level"] = _ERRORS_ONLY
    (directory / GENAI_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return onnx.describe(program, decoder)


def add_terms(graph: onnx_ir.Graph, modules: Mapping[str, tuple[int, int]]) -> None:
    """Add (x Aᵀ) Bᵀ to the outputs of linear layers, in place.

    Aᵀ [in, rank] and Bᵀ [rank, out] are inputs ``NAME.lora_A`` and ``NAME.lora_B`` with an empty
    default.

    Raises:
        InputError: A module does not have its own product in the graph.
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
        if out.is_graph_output():  # a runner asks for it by name
            out.name, total.outputs[0].name = f"{node.name}.base", out.name
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
    """Write a composition as an ONNX Runtime adapter file, in float32.

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


def check_name(name: str) -> None:
    """Check that a composition's name can be used as a file name.

    Raises:
        InputError: It cannot be used as one.
    """
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
    decoder: ShippedDecoder, ends: Iterable[str] | None, updates: Iterable[LowRankUpdate]
) -> dict[str, tuple[int, int]]:
    """(out, in) by name of the linear layers that get low-rank terms, in the model's order."""
    from torch import nn

    from caliport.export.decoder.shipped import every

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


def _facts(update: LowRankUpdate, path: Path, adapter: Path) -> dict[str, Any]:
    from caliport.export.package.card import describe_adapter

    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "modules": len(update.modules),
        "parameters": update.parameter_count,
        "adapter": content_hash(adapter),
        "lora": describe_adapter(adapter),
    }
