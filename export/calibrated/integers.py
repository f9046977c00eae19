"""Integers of linear layers that are chosen by what the layers are fed on calibration text.

The float model, with its adapters, runs on the text one layer at a time. While a layer runs, the
moments of its inputs are collected; then each of its matrices is quantized with them and written to
a file, and the layer is dropped. So one layer, its moments and the hidden states between two layers
are all that is in memory. A finished layer and the hidden states after it are files: what was
killed goes on there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from caliport.core.errors import InputError
from caliport.core.progress import at
from caliport.export.decoder.fold import Folded
from caliport.export.decoder.shipped import Plan
from caliport.export.decoder.skeleton import empty, group_layers
from caliport.export.decoder.stored import reading
from caliport.export.quantization.choices import NORMS
from caliport.export.quantization.integers import integers
from caliport.export.quantization.quantizers.registry import QUANTIZERS
from caliport.export.quantization.text import INTEGERS_KEY

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from caliport.calibrate.adapter import Adapter

_HIDDEN = "hidden.safetensors"
TUNING = "tuning.safetensors"
"""What a killed tuning of gains goes on from."""
_HEAD = "head.safetensors"
_COMPLETE = "complete"


class Integers:
    """Integers and scales of linear layers in a directory, by module name.

    Args:
        directory: Written by ``calibrated_integers``.
        tuned: With the gains that ``caliport.export.calibrated.norms`` wrote beside them.
    """

    def __init__(self, directory: Path, *, tuned: bool = False) -> None:
        from safetensors import safe_open

        self._files: dict[str, Path] = {}
        self._norms = directory / NORMS if tuned else None
        for path in sorted(directory.glob("*.safetensors")):
            if path.name not in (_HIDDEN, NORMS, TUNING):
                with safe_open(path, framework="pt") as opened:
                    names = list(opened.keys())
                self._files |= dict.fromkeys((n.rpartition(".")[0] for n in names), path)

    def __contains__(self, module: str) -> bool:
        return module in self._files

    @cached_property
    def replaced(self) -> Mapping[str, Tensor]:
        """Tuned gains of normalizations, float32 [width], by parameter name."""
        from safetensors.torch import load_file

        return {} if self._norms is None else load_file(self._norms)

    def parts(self, module: str) -> tuple[Tensor, Tensor]:
        """Packed integers, uint8 [out, in / 2], and scales, bfloat16 [out, in / 32]."""
        from safetensors import safe_open

        with safe_open(self._files[module], framework="pt") as opened:
            return opened.get_tensor(f"{module}.data"), opened.get_tensor(f"{module}.scale")


@dataclass(frozen=True)
class Calibration:
    """What a decoder is calibrated on.

    Attributes:
        base: A Hugging Face directory or hub name.
        quantizer: A name in ``QUANTIZERS`` with a ``prepare``.
        sequences: Token ids by composition; by the empty name for a fold or a base alone.
        beside: By composition of a bundle, what is beside the quantized weights.
    """

    base: str | Path
    quantizer: str
    sequences: Mapping[str, Sequence[Sequence[int]]]
    beside: Mapping[str, Adapter]


def calibrated_integers(
    plan: Plan, what: Calibration, directory: Path, key: Mapping[str, Any]
) -> Integers:
    """Quantize every 4-bit linear layer of a decoder on calibration text.

    Args:
        plan: The decoder.
        what: Its weights, and the text.
        directory: Receives the integers; what an earlier call with the same key wrote is kept.
        key: What the integers depend on.

    Raises:
        InputError: Layers that cannot be run one by one, or weights that cannot be read.
    """
    if _begin(directory, key):
        return Integers(directory)
    model = empty(plan.whole.config)
    path = group_layers(model).path
    if not path:
        raise InputError(
            f"{what.base}: its layers are in no list that can be run one by one; use quantizer hqq"
        )
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    with torch.no_grad(), reading(what.base) as read:

        def load(full: str, adapter: Adapter | None) -> Tensor:
            value = read(plan.tied.get(full, full))
            module = model.get_submodule(full.rpartition(".")[0])
            return Folded.of(adapter, module, full, value).rows(0, len(value))

        _Pass(model, layers, path, plan, what, directory, load).run()
    (directory / _COMPLETE).touch()
    (directory / _HIDDEN).unlink(missing_ok=True)
    return Integers(directory)


def _begin(directory: Path, key: Mapping[str, Any]) -> bool:
    """Make a directory for integers with this key; one with another key is emptied.

    What says how much is done goes first: without it nothing is resumed, wherever this is killed.

    Returns:
        Whether all integers are there.
    """
    place, text = directory / INTEGERS_KEY, json.dumps(key, sort_keys=True, default=str)
    complete = directory / _COMPLETE
    if place.is_file() and place.read_text(encoding="utf-8") == text:
        return complete.is_file()
    complete.unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _HIDDEN).unlink(missing_ok=True)
    for left in directory.glob("*.safetensors"):
        left.unlink()
    place.write_text(text, encoding="utf-8")
    return False


class _Stop(Exception):
    """The part of the model that was wanted has run."""


class _Pass:
    """One pass of the text through the decoder."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: nn.ModuleList,
        path: str,
        plan: Plan,
        what: Calibration,
        directory: Path,
        load: Callable[[str, Adapter | None], Tensor],
    ) -> None:
        self.model, self.layers, self.path = model, layers, path
        self.forms, self.folded, self.what = plan.forms, plan.adapter, what
        self.directory, self.load = directory, load
        self.quantizer = QUANTIZERS[what.quantizer]
        names = {id(module): name for name, module in model.named_modules()}
        self.head = names[id(model.get_output_embeddings())]
        self.table = names[id(model.get_input_embeddings())]
        for name, module in model.named_modules():
            if name not in (self.head, self.table) and not name.startswith(f"{path}."):
                self._fill(name, module, self.folded, recurse=False)
        for layer in layers:
            layer.forward = _skip

    def run(self) -> None:
        done, hidden = self._resumed()
        for index in range(done, len(self.layers)):
            at(f"calibrating layer {index + 1}", index, len(self.layers))
            hidden = self._layer(index, hidden)
            self._write(_HIDDEN, _flat(hidden), {"layers": str(index + 1)})
        if self.forms.get(self.head) == "int4" and not (self.directory / _HEAD).is_file():
            at("calibrating the head", len(self.layers), len(self.layers))
            moments = _Moments()
            head = self.model.get_submodule(self.head)
            with moments.of({self.head: head}, stop=True):
                self._through(len(self.layers), hidden, None)
            weight = self.load(f"{self.head}.weight", self.folded)
            self._write(_HEAD, self._quantized({self.head: weight}, moments))

    def _layer(self, index: int, hidden: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Quantize a layer, and return the float layer's outputs."""
        name, layer = f"{self.path}.{index}", self.layers[index]
        modules = {f"{name}.{n}": m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        chosen = {n: m for n, m in modules.items() if self.forms.get(n) == "int4"}
        del layer.forward
        moments, outputs = _Moments(), dict[str, list[Tensor]]()
        with moments.of(chosen):
            for composition, states in hidden.items():
                adapter = self.what.beside.get(composition, self.folded)
                self._fill(name, layer, adapter)
                outputs |= self._through(index, {composition: states}, layer)
        if self.what.beside:
            self._fill(name, layer, self.folded)
        weights = {n: m.weight.detach() for n, m in chosen.items()}
        self._write(f"layer-{index:04d}.safetensors", self._quantized(weights, moments))
        layer.to("meta")
        layer.forward = _skip
        return outputs

    def _through(
        self, index: int, hidden: Mapping[str, list[Tensor]], layer: nn.Module | None
    ) -> dict[str, list[Tensor]]:
        """Run the model with these hidden states before layer ``index``.

        Ends after ``layer``, whose outputs are returned; None runs to the head.
        """
        found: list[Tensor] = []

        def take(_: nn.Module, __: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise _Stop

        outputs = {}
        for composition, states in hidden.items():
            for state in states:
                put = self.layers[min(index, len(self.layers) - 1)]
                with (
                    _replaced(put, state, after=layer is None),
                    _hook(layer, take),
                    suppress(_Stop),
                ):
                    self.model(inputs_embeds=torch.zeros_like(state), use_cache=False)
            outputs[composition], found = found, []
        return outputs

    def _embedded(self) -> dict[str, list[Tensor]]:
        """The hidden states before the first layer."""
        found: dict[str, list[Tensor]] = {}
        table = self.model.get_submodule(self.table)
        assert isinstance(table, nn.Embedding)
        table.padding_idx = None
        for composition, sequences in self.what.sequences.items():
            adapter = self.what.beside.get(composition, self.folded)
            used = sorted({token for sequence in sequences for token in sequence})
            rows = self.load(f"{self.table}.weight", adapter)[used]
            table.weight = nn.Parameter(rows, requires_grad=False)
            place = {token: row for row, token in enumerate(used)}
            first: list[Tensor] = []

            def take(_: nn.Module, args: tuple[Any, ...], options: Any, to: Any = first) -> None:
                to.append(args[0] if args else options["hidden_states"])
                raise _Stop

            handle = self.layers[0].register_forward_pre_hook(take, with_kwargs=True)
            try:
                for sequence in sequences:
                    embedded = table(torch.tensor([[place[token] for token in sequence]]))
                    with suppress(_Stop):
                        self.model(inputs_embeds=embedded, use_cache=False)
            finally:
                handle.remove()
            table.to("meta")
            found[composition] = first
        return found

    def _resumed(self) -> tuple[int, dict[str, list[Tensor]]]:
        """How many layers are done, and the hidden states after them."""
        from safetensors import safe_open

        place = self.directory / _HIDDEN
        if not place.is_file():
            return 0, self._embedded()
        hidden: dict[str, list[Tensor]] = {name: [] for name in self.what.sequences}
        with safe_open(place, framework="pt") as opened:
            for composition, states in hidden.items():
                for number in range(len(self.what.sequences[composition])):
                    states.append(opened.get_tensor(f"{composition}:{number}"))
            return int(opened.metadata()["layers"]), hidden

    def _quantized(self, weights: Mapping[str, Tensor], moments: _Moments) -> dict[str, Tensor]:
        assert self.quantizer.prepare is not None
        parts: dict[str, Tensor] = {}
        for same in moments.groups(weights):
            prepared = self.quantizer.prepare(moments.pop(same[0]))
            for name in same:
                found = self._slices(weights[name], prepared)
                parts[f"{name}.data"] = torch.cat([data for data, _ in found])
                parts[f"{name}.scale"] = torch.cat([scale for _, scale in found])
        return parts

    def _slices(self, weight: Tensor, prepared: Any) -> list[tuple[Tensor, Tensor]]:
        def rows(start: int, stop: int) -> Tensor:
            part = weight[start:stop]
            if not part.sum().isfinite():
                raise InputError("found NaN or infinite weights, expected finite ones")
            return part

        count, width = weight.shape
        quantize = self.quantizer.quantize
        return list(integers(rows, count, width, "int4", lambda part: quantize(part, prepared)))

    def _fill(
        self, name: str, module: nn.Module, adapter: Adapter | None, recurse: bool = True
    ) -> None:
        """Give a module's parameters their values."""
        for key, _ in list(module.named_parameters(recurse=recurse)):
            full = f"{name}.{key}" if name else key
            parent = self.model.get_submodule(full.rpartition(".")[0])
            value = nn.Parameter(self.load(full, adapter), requires_grad=False)
            setattr(parent, full.rpartition(".")[2], value)

    def _write(
        self, name: str, tensors: dict[str, Tensor], facts: dict[str, str] | None = None
    ) -> None:
        from safetensors.torch import save_file

        beside = self.directory / f".{name}.new"
        save_file(tensors, beside, metadata=facts)
        beside.replace(self.directory / name)


class _Moments:
    """Sums of x·xᵀ over the inputs of linear layers; layers with the same inputs share one."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}

    @contextmanager
    def of(self, modules: Mapping[str, nn.Module], stop: bool = False) -> Iterator[None]:
        """Collect while the body runs; ``stop`` ends a run of the model at the first module."""
        latest: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[..., None]:
            def collect(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                latest[name] = args[0]
                if name not in self._first:
                    self._first[name] = next(n for n, x in latest.items() if x is args[0])
                if self._first[name] == name:
                    x = args[0].flatten(0, -2)
                    known = self._sums.get(name)
                    if known is None:
                        known = self._sums[name] = torch.zeros(x.shape[1], x.shape[1])
                    known.addmm_(x.T, x)
                if stop:
                    raise _Stop

            return collect

        handles = [m.register_forward_pre_hook(hook(name)) for name, m in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def groups(self, names: Mapping[str, Any]) -> list[list[str]]:
        """Names of modules with the same inputs."""
        found: dict[str, list[str]] = {}
        for name in names:
            if name not in self._first:
                raise InputError(f"{name}: no calibration text reached it; use quantizer hqq")
            found.setdefault(self._first[name], []).append(name)
        return list(found.values())

    def pop(self, name: str) -> Tensor:
        """The moments of a module's inputs, [in, in]; forgotten here."""
        return self._sums.pop(self._first[name])


def _skip(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


@contextmanager
def _replaced(layer: nn.Module, state: Tensor, after: bool) -> Iterator[None]:
    """While the body runs, a layer gets (or, with ``after``, gives) a hidden state."""

    def before(_: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        if args:
            return (state, *args[1:]), options
        return args, {**options, "hidden_states": state}

    handle = (
        layer.register_forward_hook(lambda *_: state)
        if after
        else layer.register_forward_pre_hook(before, with_kwargs=True)
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _hook(layer: nn.Module | None, take: Callable[..., None]) -> Iterator[None]:
    handle = None if layer is None else layer.register_forward_hook(take)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _flat(hidden: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    return {
        f"{composition}:{number}": state
        for composition, states in hidden.items()
        for number, state in enumerate(states)
    }
