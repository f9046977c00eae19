"""A decoder as it is exported: its shape, and its weights in files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from export.quantize import Form, plan
from export.skeleton import Layers, empty, group_layers
from export.weights import Weights, store

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Lean:
    """A decoder whose weights are in files.

    Attributes:
        whole: All its modules, parameters on the ``meta`` device.
        forms: How each linear layer and embedding ships.
        weights: The parameters, folded and quantized.
    """

    whole: PreTrainedModel
    forms: dict[str, Form]
    weights: Weights


def forms_of(decoder: Lean, layer: int) -> tuple[Form, ...]:
    """The forms that the weights of a layer ship in."""
    path = f"{every(decoder).path}.{layer}."
    return tuple(form for name, form in decoder.forms.items() if name.startswith(path))


def group(decoder: Lean) -> Layers:
    """Which layers are alike, the forms of their weights too."""
    return group_layers(decoder.whole, lambda layer: forms_of(decoder, layer))


def every(decoder: Lean) -> Layers:
    """Each layer by itself."""
    return group_layers(decoder.whole, lambda layer: layer)


@contextmanager
def lean(
    base: str | Path,
    adapter: Path | None,
    precision: str,
    scratch: Path,
    *,
    int8: Iterable[str] = (),
    embedding_bits: int | None = None,
    check: Callable[[PreTrainedModel], None] = lambda model: None,
    on_module: Callable[[str], None] = lambda name: None,
) -> Iterator[Lean]:
    """Fold an adapter into a base and quantize, without ever holding the model in memory.

    Args:
        base: A Hugging Face directory or hub name of a decoder.
        adapter: A PEFT LoRA directory or None.
        precision: One of ``PRECISIONS``.
        scratch: A directory in which the weights lie while the body runs.
        int8: Linear layers that stay at 8 bits (``export.quantize.plan``).
        embedding_bits: See ``export.quantize.plan``.
        check: Called with the decoder on the ``meta`` device before any weight is read.
        on_module: Called with each module's name before its weights are read.

    Raises:
        InputError: See ``plan``, ``check`` and ``LowRankUpdate``.
    """
    from calibrate.low_rank import LowRankUpdate
    from caliport_core.checkpoints import load_config

    config, generation = load_config(base)
    whole = empty(config)
    if generation is not None:
        whole.generation_config = generation
    check(whole)
    forms = plan(whole, precision, int8, embedding_bits)
    update = None if adapter is None else LowRankUpdate.from_peft(adapter)
    if update is not None and adapter is not None:
        update.check_fits(whole, adapter)
    with TemporaryDirectory(dir=scratch, prefix="weights-") as directory:
        weights = store(base, whole, forms, update, Path(directory), on_module)
        yield Lean(whole, forms, weights)
