"""What a runtime has to know of itself, and the runtimes that there are.

A runtime is a folder ``export/NAME`` with a file ``runtime.py`` that defines ``RUNTIME``. Nothing
outside that folder, and ``validation/runners/NAME.py`` which runs what it made, knows its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from caliport.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from caliport.export.decoder.parts import Part
    from caliport.export.decoder.shipped import ShippedDecoder
    from caliport.export.quantization.choices import Form
    from caliport.export.request import Request

Rounding = Literal["token", "block"]
"""What shares one scale when a quantized product rounds its input to 8 bits."""


class Runtime(Protocol):
    """How a decoder becomes a program of one runtime.

    Attributes:
        name: Names it in flags, recipes, manifests and directories.
        title: Names it to people, in full.
        label: Names it in tables and plots.
        package: The distribution that runs its programs.
        needs: Distributions that the code in a model card imports.
        modules: Modules to import for export and validation on this machine.
        rounding: How its kernels round the inputs of quantized products.
        program: The program's file.
        shares_adapters: Whether a bundle stores single-task adapters once for all compositions.
        has_int8_cache: Whether keys and values can be kept in int8.
        bundle_note: What a model card says of a bundle's compositions.
        costs: Its part of the estimate before an export.
    """

    name: str
    title: str
    label: str
    package: str
    needs: tuple[str, ...]
    modules: tuple[str, ...]
    rounding: Rounding
    program: str
    shares_adapters: bool
    has_int8_cache: bool
    bundle_note: str
    costs: Costs

    def recognizes(self, directory: Path) -> bool:
        """Whether a directory without a manifest holds a program of this runtime."""
        ...

    def check_name(self, name: str) -> None:
        """Check the name of a composition in a bundle.

        Raises:
            InputError: It cannot be one.
        """
        ...

    def check(self, request: Request) -> None:
        """Check a request before anything is read.

        Raises:
            InputError: It asks for something that this runtime has not.
        """
        ...

    def check_model(self, request: Request, model: PreTrainedModel) -> None:
        """Check a decoder on the ``meta`` device, before any weight is read.

        Raises:
            InputError: It cannot be exported as asked.
        """
        ...

    def lower(
        self,
        decoder: ShippedDecoder,
        directory: Path,
        request: Request,
        context: int,
        tokenizer: PreTrainedTokenizerBase,
    ) -> dict[str, Any]:
        """Write the program and the files that only this runtime reads.

        Args:
            decoder: The weights as they ship, and what they are the weights of.
            directory: Where to; must exist.
            request: What was asked for; a fold or a bundle.
            context: Tokens of the key-value cache.
            tokenizer: Gives the ids of special tokens.

        Returns:
            Manifest entries: ``lowering``, and of a bundle ``bundle``.

        Raises:
            InputError: The model cannot be exported this way.
        """
        ...

    def adapter_form(self, precision: str) -> Form | None:
        """How a bundle's shared adapters are quantized; None for float32."""
        ...

    def code(self, composition: str | None, chat: bool, context: int) -> str:
        """Python that runs an artifact, or a composition of a bundle, from its directory."""
        ...

    def runner_words(self, bundle: bool) -> str:
        """What a model card calls that which runs the code above."""
        ...


class Costs(Protocol):
    """What one runtime adds to the estimate of ``caliport.export.preflight``.

    Attributes:
        lowering: Bytes of Python and libraries with a graph, while it is lowered and written.
        start: Seconds for imports, tokenizer, tracing and lowering.
        layer: Seconds to repeat a layer of a method.
        keeps_terms: Whether the terms of a bundle are in files until the program is written.
    """

    lowering: float
    start: float
    layer: float
    keeps_terms: bool

    def shipped(self, part: Part) -> int:
        """Bytes in the program that a parameter adds to those of the others."""
        ...

    def graph(self, model: PreTrainedModel, context: int | None) -> int:
        """Bytes of constants that the program has beside the parameters."""
        ...

    def copied(self, parts: Sequence[Part], precision: str) -> float:
        """Bytes of weights in memory while the program is written."""
        ...

    def methods(self, compositions: int) -> int:
        """Methods of a bundle with so many compositions."""
        ...

    def term_bytes(self, precision: str) -> tuple[int, int]:
        """Bytes for a value of a composition's own terms, and of a shared adapter."""
        ...


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """The runtimes that there are, by the folders beside this file; none is imported."""
    return tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/runtime.py")))


def get(name: str) -> Runtime:
    """A runtime by its name.

    Raises:
        InputError: There is none.
    """
    if name not in names():
        raise InputError(f"runtime: found {name!r}, expected one of {', '.join(names())}")
    found: Runtime = import_module(f"caliport.export.{name}.runtime").RUNTIME
    return found


def labels() -> Mapping[str, str]:
    """What tables and plots call each runtime."""
    return {name: get(name).label for name in names()}


def recognized(directory: Path) -> list[str]:
    """The runtimes whose programs are in a directory."""
    return [name for name in names() if get(name).recognizes(directory)]
