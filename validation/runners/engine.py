"""What runs and reads back the artifacts of one runtime: the host's counterpart of ``Runtime``.

An engine is a module ``caliport.validation.runners.NAME``, named like its runtime, that defines
``ENGINE``. Nothing else in ``caliport.validation`` knows a runtime's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from caliport.export import runtime as runtimes
from caliport.export.artifact import Artifact
from caliport.export.runtime import Rounding
from caliport.validation.runners.runner import Runner

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from caliport.export.decoder.shipped import ShippedDecoder
    from caliport.validation.runners.weights import StoredWeight

PLAIN = "plain"
"""The word for an artifact's runtime itself; engines may know other words."""

Differing = Mapping[str, "Callable[[], StoredWeight | None]"]
"""Modules whose weight is not the requested one, with what finds what is stored instead."""


class Engine(Protocol):
    """How artifacts of one runtime are run and read back on this machine.

    Attributes:
        stock: What reports call the runtime's own text generator.
        alternatives: Other runners of its artifacts, by the word that chooses them; the value is
            their name.
        runs_in_float: Whether its programs can run without rounding activations (``open_float``).
        arm_rounding: How it rounds the inputs of quantized products on Arm, by precision, where
            that is not as ``Runtime.rounding`` says.
    """

    stock: str
    alternatives: Mapping[str, str]
    runs_in_float: bool
    arm_rounding: Mapping[str, Rounding]

    def preload(self) -> None:
        """Import what running needs, so that memory and load times leave it out."""
        ...

    def try_program(self, artifact: Artifact) -> None:
        """Check a stranger's program before this process opens it; a sound one is remembered.

        Raises:
            InputError: It would read files elsewhere, load code, or crash the process.
        """
        ...

    def open(
        self, artifact: Artifact, threads: int, composition: str | None, runner: str
    ) -> Runner:
        """Open an artifact; its hashes are checked first.

        Args:
            artifact: One of this runtime.
            threads: Threads of the runtime's own pool.
            composition: Of a bundle; None for its base, or for a fold.
            runner: ``PLAIN`` or one of ``alternatives``.

        Raises:
            InputError: It cannot be loaded, its files have changed, or it has no such composition.
        """
        ...

    def open_float(self, artifact: Artifact, threads: int) -> Runner:
        """Open a fold so that quantized products multiply in float32; see ``runs_in_float``.

        Raises:
            InputError: As ``open``, or this runtime cannot.
        """
        ...

    def selector(self, artifact: Artifact, composition: str | None) -> str | None:
        """What the runtime calls a composition: a file of the directory, or a method.

        Raises:
            InputError: The bundle has no such composition.
        """
        ...

    def generate(
        self, artifact: Artifact, text: str, max_new_tokens: int, composition: str | None
    ) -> str:
        """What the stock runner writes after ``text``, greedily.

        Raises:
            InputError: It cannot be loaded, or the prompt does not fit the context.
        """
        ...

    def gap(self, composition: str | None) -> str | None:
        """Why the stock runner cannot run a composition; None where it can."""
        ...

    def ends(self, artifact: Artifact) -> list[int]:
        """Token ids at which the stock runner ends a text, read from the artifact's files."""
        ...

    def differing_settings(
        self, artifact: Artifact, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> list[str]:
        """Names of settings in the runtime's own files that are not what the base gives.

        Ends of a text (``ends``) and choices of a session, such as threads, are left out.

        Args:
            artifact: One of ours.
            model: The base without its weights, with its generation settings.
            tokenizer: The base's.
        """
        ...

    def integers(
        self, artifact: Artifact, shapes: Mapping[str, tuple[int, int]]
    ) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Integers of 4-bit linear layers, found by the hashes or names that a program has.

        Args:
            artifact: One whose manifest records their hashes (``Artifact.calibrated``).
            shapes: [out, in] of each.

        Yields:
            Layers with packed integers, uint8 [out, in / 2], and scales, bfloat16 [out, in / 32];
            those that the program does not hold in this shape are left out.

        Raises:
            InputError: The program cannot be read.
        """
        ...

    def differing_weights(
        self, artifact: Artifact, decoder: ShippedDecoder, ranks: Mapping[str, int]
    ) -> Differing:
        """Weight matrices of a fold that are not, bit for bit, those that should have shipped.

        Args:
            artifact: A fold of this runtime.
            decoder: The weights as they should have shipped.
            ranks: Of the adapter, by module.
        """
        ...


def get(name: str) -> Engine:
    """The engine of a runtime.

    Raises:
        InputError: There is no runtime of that name.
    """
    runtimes.get(name)
    found: Engine = import_module(f"caliport.validation.runners.{name}").ENGINE
    return found


def alternatives() -> dict[str, str]:
    """The alternative runners of all engines: name by word."""
    return {
        word: name
        for runtime in runtimes.names()
        for word, name in get(runtime).alternatives.items()
    }
