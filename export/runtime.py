"""The protocol of a runtime, and the runtimes found in this package.

A runtime is a folder ``export/NAME`` with a file ``runtime.py`` that defines ``RUNTIME``. Only that
folder and ``validation/runners/NAME.py``, which runs its programs, refer to it by name.
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
"""The values that share one scale when a quantized product rounds its input to 8 bits."""


class Runtime(Protocol):
    """How a decoder becomes a program of one runtime.

    Attributes:
        name: Its name in flags, recipes, manifests and directories.
        title: Its full name in texts.
        label: Its name in tables and plots.
        package: The distribution that runs its programs.
        needs: Distributions that the code in a model card imports.
        modules: Modules that export and validation on the host import.
        rounding: How its kernels round the inputs of quantized products.
        program: File name of the program.
        shares_adapters: Whether a bundle stores single-task adapters once for all compositions.
        has_int8_cache: Whether keys and values can be kept in int8.
        bundle_note: The model card's note about a bundle's compositions.
        costs: Its part of the preflight estimate.
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
            InputError: It is not a valid name for this runtime.
        """
        ...

    def check(self, request: Request) -> None:
        """Check a request before anything is read.

        Raises:
            InputError: It asks for something that this runtime does not support.
        """
        ...

    def check_model(self, request: Request, model: PreTrainedModel) -> None:
        """Check a decoder on the ``meta`` device, before any weight is read.

        Raises:
            InputError: It cannot be exported as requested.
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
            decoder: The decoder and its weights as they ship.
            directory: Where to write; must exist.
            request: The request, for a fold or a bundle.
            context: Length of the key-value cache in tokens.
            tokenizer: Source of the special tokens' ids.

        Returns:
            Manifest entries: ``lowering``, and for a bundle also ``bundle``.

        Raises:
            InputError: The model cannot be exported this way.
        """
        ...

    def adapter_form(self, precision: str) -> Form | None:
        """How a bundle's shared adapters are quantized; None for float32."""
        ...

    def code(self, composition: str | None, chat: bool, context: int, text: str) -> str:
        """Python that asks an artifact, or a composition of a bundle, one text."""
        ...

    def runner_words(self, bundle: bool) -> str:
        """The model card's words for what runs the code above."""
        ...


class Costs(Protocol):
    """What one runtime adds to the estimate of ``caliport.export.preflight``.

    Attributes:
        lowering: Bytes of Python, libraries and graph while it is lowered and written.
        start: Seconds for imports, tokenizer, tracing and lowering.
        layer: Seconds to repeat a layer of a method.
        keeps_terms: Whether a bundle's low-rank terms are kept in files until the program is
            written.
    """

    lowering: float
    start: float
    layer: float
    keeps_terms: bool

    def shipped(self, part: Part) -> int:
        """Bytes that a parameter adds to the program."""
        ...

    def graph(self, model: PreTrainedModel, context: int | None) -> int:
        """Bytes of the program's constants other than parameters."""
        ...

    def copied(self, parts: Sequence[Part], precision: str) -> float:
        """Bytes of weights in memory while the program is written."""
        ...

    def methods(self, compositions: int) -> int:
        """Number of methods of a bundle with this many compositions."""
        ...

    def term_bytes(self, precision: str) -> tuple[int, int]:
        """Bytes per value of a composition's own terms, and of a shared adapter."""
        ...


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """Names of all runtimes, from the folders beside this file; none is imported."""
    return tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/runtime.py")))


def get(name: str) -> Runtime:
    """A runtime by its name.

    Raises:
        InputError: There is no runtime of that name.
    """
    if name not in names():
        raise InputError(f"runtime: found {name!r}, expected one of {', '.join(names())}")
    found: Runtime = import_module(f"caliport.export.{name}.runtime").RUNTIME
    return found


def labels() -> Mapping[str, str]:
    """Each runtime's name in tables and plots."""
    return {name: get(name).label for name in names()}


def recognized(directory: Path) -> list[str]:
    """Names of the runtimes whose programs are in a directory."""
    return [name for name in names() if get(name).recognizes(directory)]
