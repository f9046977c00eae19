"""A decoder ready to be lowered: its structure, and its folded and quantized weights in files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING, Any

from torch import nn

from caliport.core.patching import exclusive
from caliport.export.decoder.fold import untie
from caliport.export.decoder.skeleton import Layers, empty, group_layers
from caliport.export.decoder.stored import Weights, can_stream, reading, store
from caliport.export.quantization.choices import Form, Quantization
from caliport.export.quantization.tensors import KnownIntegers, plan_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from caliport.calibrate.adapter import Adapter


@dataclass(frozen=True)
class Plan:
    """What is about to ship.

    Attributes:
        whole: All modules, with parameters on the ``meta`` device.
        forms: How each linear layer and embedding ships.
        adapter: What is folded in, with the decoder's names; None for nothing.
        tied: For each tied parameter, the name that it is stored by.
    """

    whole: PreTrainedModel
    forms: dict[str, Form]
    adapter: Adapter | None
    tied: Mapping[str, str]


IntegerSource = Callable[[Plan], KnownIntegers]
"""Gives the integers of linear layers of a decoder that is about to ship."""


@dataclass(frozen=True)
class ShippedDecoder:
    """A decoder whose weights are in files.

    Attributes:
        whole: All its modules, with parameters on the ``meta`` device.
        forms: How each linear layer and embedding ships.
        stored: Future of the parameters, folded and quantized.
        cache_bits: 8 for keys and values in int8, None for float32.
        adapter: What was folded in, with the decoder's names; None for nothing.
    """

    whole: PreTrainedModel
    forms: dict[str, Form]
    stored: Future[Weights]
    cache_bits: int | None = None
    adapter: Adapter | None = None

    @property
    def weights(self) -> Weights:
        """The folded and quantized parameters; waits until all are stored."""
        return self.stored.result()

    def names(self) -> set[str]:
        """Names in ``weights``; available before the weights are."""
        found: set[str] = set()
        for name, _ in self.whole.named_parameters(remove_duplicate=False):
            quantized = name.removesuffix(".weight") in self.forms and name.endswith(".weight")
            found |= {f"{name}.data", f"{name}.scale"} if quantized else {name}
        return found

    def sizes(self) -> dict[str, Any]:
        """Bytes by part, with shared contents counted once, and bits per weight.

        ``embedding`` includes a tied head; ``scales`` are the scales of all parts.
        """
        parts = {"linear": 0, "head": 0, "embedding": 0, "scales": 0, "other": 0}
        head = self.whole.get_output_embeddings()
        kinds = {
            name: "embedding"
            if isinstance(module, nn.Embedding)
            else "head"
            if module is head
            else "linear"
            for name, module in self.whole.named_modules()
            if isinstance(module, nn.Linear | nn.Embedding)
        }
        seen: set[Path] = set()
        ours = self.names()  # a bundle's terms are stored too, but not counted here
        for name, stored in self.weights.items():
            if name in ours and stored.path not in seen:
                seen.add(stored.path)
                module = name.removesuffix(".data").removesuffix(".scale").removesuffix(".weight")
                part = kinds.get(module, "other")
                parts["scales" if name.endswith(".scale") else part] += stored.nbytes
        weights = sum(parameter.numel() for parameter in self.whole.parameters())
        total = sum(parts.values())
        return {**parts, "total": total, "bits_per_weight": round(8 * total / weights, 3)}


def forms_of(decoder: ShippedDecoder, layer: int) -> tuple[Form, ...]:
    """The forms that the weights of a layer ship in."""
    path = f"{every(decoder).path}.{layer}."
    return tuple(form for name, form in decoder.forms.items() if name.startswith(path))


def group(decoder: ShippedDecoder) -> Layers:
    """Group layers with the same modules, shapes and settings, and weights of the same forms."""
    return group_layers(decoder.whole, lambda layer: forms_of(decoder, layer))


def every(decoder: ShippedDecoder) -> Layers:
    """Put each layer in its own group."""
    return group_layers(decoder.whole, lambda layer: layer)


def planned(
    base: str | Path,
    adapter: Path | None,
    how: Quantization,
    check: Callable[[PreTrainedModel], None] = lambda model: None,
) -> Plan:
    """What would ship, from configurations and an adapter alone.

    Raises:
        InputError: See ``shipped_decoder``.
    """
    from caliport.calibrate.bases import note_base
    from caliport.calibrate.peft_files import read_adapter
    from caliport.core.checkpoints import load_config

    config, generation = load_config(base)
    whole = empty(config)
    if generation is not None:
        whole.generation_config = generation
    tied = {**(whole.all_tied_weights_keys or {})}  # before an adapter unties the head
    changes = None
    if adapter is not None:
        note_base(adapter, base)
        changes = read_adapter(adapter).fitted(whole, adapter)
        with reading(base) as read:
            changes = changes.check_saved(lambda name: read(tied.get(name, name)), adapter)
        untie(whole, changes)
    check(whole)
    return Plan(whole, plan_of(whole, how), changes, tied)


@contextmanager
def shipped_decoder(
    base: str | Path,
    adapter: Path | None,
    how: Quantization | str,
    scratch: Path,
    *,
    check: Callable[[PreTrainedModel], None] = lambda model: None,
    integers: IntegerSource | None = None,
) -> Iterator[ShippedDecoder]:
    """Fold an adapter into a base and quantize, without ever holding the whole model in memory.

    The body runs in parallel until it reads ``ShippedDecoder.weights``: tracing does not need
    them. Other threads that call this wait until the body ends, since lowering patches the whole
    process.

    Args:
        base: A Hugging Face directory or hub name of a decoder.
        adapter: A PEFT LoRA directory or None.
        how: How it is quantized; a precision stands for its defaults.
        scratch: A directory that stores the weights while the body runs.
        check: Called with the decoder on the ``meta`` device before any weight is read.
        integers: Gives integers that were found before, or finds them now, in place of the
            quantizer that needs no text.

    Raises:
        InputError: See ``plan``, ``check``, ``read_adapter`` and ``Adapter``.
    """
    how = Quantization(how) if isinstance(how, str) else how
    plan = planned(base, adapter, how, check)
    whole, forms, changes, tied = plan.whole, plan.forms, plan.adapter, plan.tied
    known = None if integers is None else integers(plan)
    with exclusive(), TemporaryDirectory(dir=scratch, prefix="weights-") as directory:
        fill = partial(store, base, whole, forms, changes, Path(directory), tied, known)
        if not can_stream(base, whole, tied):
            # Loading builds modules while the body patches how modules are built.
            stored: Future[Weights] = Future()
            stored.set_result(fill())
            yield ShippedDecoder(whole, forms, stored, how.cache_bits, changes)
            return
        # torch.export 2.13 replaces math.pow while it traces; numba must be loaded before that.
        import caliport.export.quantization.quantizers.hqq  # noqa: F401

        stop = Event()
        with ThreadPoolExecutor(1) as pool:
            stored = pool.submit(copy_context().run, fill, stop)
            try:
                yield ShippedDecoder(whole, forms, stored, how.cache_bits, changes)
            finally:
                stop.set()
