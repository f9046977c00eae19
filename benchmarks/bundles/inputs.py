"""The alternative way to bundle: one method that takes a composition's A and B as inputs.

``forward(tokens, input_pos, A, B, …)`` in the order of the manifest's ``lowering.inputs``; A is
[1, R, in] and B [1, out, R], float32. Adapters and corrections are stored in files beside the
program, and the host computes A and B from them when it switches. All compositions of a program
have the same R.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.peft_files import read_peft
from caliport.core.checkpoints import eos_ids
from caliport.core.directories import content_hash, read_manifest
from caliport.core.outputs import new_directory
from caliport.core.patching import quiet, swapped
from caliport.export.decoder.shipped import ShippedDecoder, group
from caliport.export.decoder.skeleton import Layers, furnish, skeleton
from caliport.export.decoder.terms import Composed, halves, split
from caliport.export.executorch.files import PROGRAM
from caliport.export.executorch.lower import constant_methods
from caliport.export.executorch.patches.fast_lowering import fast_lowering
from caliport.export.executorch.patches.tied_tables import shared_tables
from caliport.export.executorch.repeat import repeat
from caliport.export.executorch.runtime import RUNTIME, ExecuTorch
from caliport.export.executorch.steps import count_delegated, finish, lower_skeleton, with_weights
from caliport.export.make import fill
from caliport.export.quantization.choices import Quantization
from caliport.export.quantization.integers import integers
from caliport.export.request import Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from caliport.export.executorch.steps import Lowered

_PLACES, _INPUTS = "places", "inputs"


def to_inputs(
    base: Path,
    compositions: Mapping[str, Path],
    out: Path,
    *,
    adapters: Mapping[str, Path],
    precision: str = "int4",
    context: int | None = None,
) -> Path:
    """Export a base whose linear layers take the terms of a composition as inputs.

    Args:
        base: A Hugging Face directory of a decoder.
        compositions: PEFT LoRA directories by name, all with the same ranks.
        out: The artifact directory to write; its ``adapters/NAME.safetensors`` have 8-bit rows,
            ``compositions/NAME.safetensors`` float16 values.
        adapters: PEFT LoRA directories of adapters that compositions may contain.
        precision: Precision of the base.
        context: Cache length in tokens.
    """
    inputs = {"base": content_hash(base)}
    inputs |= {name: content_hash(path) for name, path in {**adapters, **compositions}.items()}
    settings = {"way": "inputs", "precision": precision, "context": context}
    request = Request(base, RUNTIME.name, Quantization(precision), context)
    with new_directory(out, "export", inputs, settings) as (directory, extra):
        fill(directory, extra, request, _AsInputs(compositions, adapters))
    return out


class _AsInputs(ExecuTorch):
    """ExecuTorch with compositions' terms as inputs of one method."""

    def __init__(self, compositions: Mapping[str, Path], adapters: Mapping[str, Path]) -> None:
        self._compositions, self._adapters = compositions, adapters

    def lower(
        self,
        decoder: ShippedDecoder,
        directory: Path,
        request: Request,
        context: int,
        tokenizer: PreTrainedTokenizerBase,
    ) -> dict[str, Any]:
        """Write the program, and the terms as safetensors files."""
        shared = {name: read_peft(path) for name, path in self._adapters.items()}
        for folder in ("adapters", "compositions"):
            (directory / folder).mkdir()
        for name, update in shared.items():
            _save_rows(update, directory / "adapters" / f"{name}.safetensors")
        ranks: dict[str, int] = {}
        for name, path in self._compositions.items():
            update = read_peft(path)
            ranks = {module: update.rank(module) for module in update.modules}
            composed = split(update, shared)
            _save_own(composed, directory / "compositions" / f"{name}.safetensors")
        ends = eos_ids(decoder.whole)
        constants = constant_methods(decoder.whole, context, ends, tokenizer.bos_token_id)
        return {"lowering": _lower(decoder, ranks, directory, context, constants)}


def _lower(
    decoder: ShippedDecoder,
    ranks: Mapping[str, int],
    directory: Path,
    context: int,
    constants: dict[str, Any],
) -> dict[str, Any]:
    with quiet(), fast_lowering():
        layers = group(decoder)
        model = furnish(skeleton(decoder.whole.config, layers), layers, decoder.forms)
        linears = {
            name: module
            for name, module in model.named_modules()
            if layers.whole_name(name) in ranks
        }
        lowered = lower_skeleton(
            model,
            layers,
            context,
            lambda name: layers.whole_name(name) in decoder.weights,
            swapped(torch.export, "export", _with_inputs(linears, layers, ranks)),
        )
        program, used = repeat(_by_layer(lowered, linears), layers, decoder.weights)
        held = lowered.constants
        edge = with_weights({"forward": program}, constants, decoder.weights, used, held)
        counts = count_delegated(edge)
        with shared_tables(decoder):
            made = finish(edge)
    with (directory / PROGRAM).open("wb") as stream:
        made.write_to_file(stream)
    specs = program.graph_signature.input_specs
    return {
        "backend": "xnnpack",
        "methods": ["forward"],
        "constant_methods": constants,
        _INPUTS: [
            str(spec.target).removeprefix("model.")
            for spec in specs
            if spec.kind == InputKind.USER_INPUT and spec.target
        ],
        **counts,
    }


class _Linear(nn.Linear):
    """A subclass, so that executorch 1.5.1 does not take its terms for a part of ``nn.Linear``."""


def _with_inputs(
    linears: Mapping[str, nn.Module], layers: Layers, ranks: Mapping[str, int]
) -> Callable[..., Any]:
    """``torch.export.export`` for a decoder whose linear layers also add terms from inputs."""
    plain = torch.export.export

    def export(decoder: nn.Module, args: Any, *, dynamic_shapes: Any, strict: bool) -> Any:
        given: list[Tensor] = []
        forward = decoder.forward

        def with_factors(tokens: Tensor, input_pos: Tensor, factors: list[Tensor]) -> Tensor:
            given[:] = factors
            found: Tensor = forward(tokens, input_pos)
            return found

        def add(index: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # XNNPACK packs a product's right factor at every call, so it is the small one here.
            inner = torch.bmm(given[2 * index], inputs[0].transpose(1, 2))
            return output + torch.bmm(given[2 * index + 1], inner).transpose(1, 2)

        factors: list[Tensor] = []
        for index, (name, linear) in enumerate(linears.items()):
            rows, width = linear.get_parameter("weight").shape
            rank = ranks[layers.whole_name(name)]
            factors += [torch.zeros(1, rank, width), torch.zeros(1, rows, rank)]
            linear.__class__ = _Linear
            linear.register_forward_hook(partial(add, index))
        decoder.forward = with_factors
        shapes = {**dynamic_shapes, "factors": [None] * len(factors)}
        return plain(decoder, (*args, factors), dynamic_shapes=shapes, strict=strict)

    return export


def _by_layer(lowered: Lowered, linears: Mapping[str, nn.Module]) -> Lowered:
    """Name the inputs after their layers, so that each repeated layer gets its own."""
    program = lowered.program
    specs = [s for s in program.graph_signature.input_specs if s.kind == InputKind.USER_INPUT][2:]
    names = [f"model.{name}.{side}" for name in linears for side in "AB"]
    for spec, name in zip(specs, names, strict=True):
        spec.target = name
    signature = program.module_call_graph[0].signature
    assert signature is not None
    signature.inputs = signature.inputs[:2]  # the others were renamed in the graph
    return lowered


class Factors:
    """Compositions' terms as inputs, computed from an artifact's files and cached.

    Args:
        directory: An artifact directory from ``to_inputs``.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.inputs: list[str] = read_manifest(directory)["lowering"][_INPUTS]
        self._kept: dict[str, list[Tensor]] = {}

    def of(self, name: str) -> list[Tensor]:
        """The program's inputs after tokens and position."""
        if name not in self._kept:
            self._kept[name] = self._made(name)
        return self._kept[name]

    def _made(self, name: str) -> list[Tensor]:
        own, facts = _read(self._directory / "compositions" / f"{name}.safetensors")
        places: dict[str, str] = json.loads(facts[_PLACES])
        weight, used = float(facts["weight"]), json.loads(facts["adapters"])
        shared = [_read(self._directory / "adapters" / f"{task}.safetensors")[0] for task in used]
        found = []
        for place in self.inputs:
            terms = [own[places[place]].float()]
            if shared:
                rows = [a[f"{place}.data"] * a[f"{place}.scale"] for a in shared]
                terms.insert(0, weight * torch.stack(rows).sum(0))
            found.append(torch.cat(terms, 0 if place.endswith("A") else 1)[None])
        return found


def _save_rows(update: LowRankUpdate, path: Path) -> None:
    """Save an adapter as 8-bit rows, with the integers of ``caliport.export.executorch.bundle``."""
    tensors = {}
    for module in update.modules:
        for side, matrix in (("A", update.a[module]), ("B", update.b[module])):
            count, width = matrix.shape
            parts = list(integers(partial(_rows, matrix), count, width, "int8"))
            tensors[f"{module}.{side}.data"] = torch.cat([data for data, _ in parts])
            tensors[f"{module}.{side}.scale"] = torch.cat([scale for _, scale in parts])
    save_file(tensors, path)


def _rows(matrix: Tensor, start: int, stop: int) -> Tensor:
    return matrix[start:stop]


def _save_own(composed: Composed, path: Path) -> None:
    """Save a composition's own terms, equal ones once, and the names of its adapters."""
    assert composed.own is not None
    tensors: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    for module in composed.own.modules:
        pair = halves(composed.own.a[module], composed.own.b[module])
        for side, value in zip("AB", pair, strict=True):
            key = hashlib.sha256(value.numpy().tobytes()).hexdigest()[:16]
            tensors[key] = value
            places[f"{module}.{side}"] = key
    facts = {
        _PLACES: json.dumps(places),
        "weight": repr(composed.weight),
        "adapters": json.dumps(composed.adapters),
    }
    save_file(tensors, path, metadata=facts)


def _values(adapter: Mapping[str, Tensor], name: str) -> Tensor:
    return adapter[f"{name}.data"] * adapter[f"{name}.scale"]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
