"""What an export is asked for: one frozen request from the command line to the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from caliport.export.quantization.choices import Quantization


@dataclass(frozen=True)
class Bundle:
    """Compositions that stay beside one frozen base.

    Attributes:
        compositions: PEFT LoRA directories by the names that the compositions get.
        shared: Single-task adapters by name, stored once for all compositions that contain them.
        modules: Ends of the names of the linear layers that can be updated, such as ``q_proj``;
            None for all in the decoder's layers. Those that a composition updates always can.
    """

    compositions: Mapping[str, Path]
    shared: Mapping[str, Path] = field(default_factory=dict)
    modules: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Request:
    """One artifact to make: a fold of at most one adapter, or a bundle of compositions.

    Attributes:
        base: A Hugging Face directory or hub name of a decoder.
        runtime: The name of a runtime (``caliport.export.runtime.names``).
        quantization: How the base, with what is folded into it, is quantized.
        context: Tokens of the key-value cache, prompt and answer together; None for the base's own
            maximum.
        adapter: A fold's PEFT LoRA directory; None exports the base alone.
        bundle: What stays beside the base; None for a fold.
    """

    base: str | Path
    runtime: str
    quantization: Quantization
    context: int | None = None
    adapter: Path | None = None
    bundle: Bundle | None = None

    @property
    def label(self) -> str:
        """Runtime and precision, as shown to people."""
        return f"{self.runtime} {self.quantization.precision}"

    def adapters(self) -> list[Path]:
        """Every adapter that is read."""
        if self.bundle is None:
            return [] if self.adapter is None else [self.adapter]
        return [*self.bundle.compositions.values(), *self.bundle.shared.values()]

    def inputs(self) -> dict[str, Path | str]:
        """What the artifact is made from, by the labels in its manifest."""
        found: dict[str, Path | str] = {"base": self.base}
        if self.adapter is not None:
            found["adapter"] = self.adapter
        if self.bundle is not None:
            found |= {f"composition {name}": p for name, p in self.bundle.compositions.items()}
            found |= {f"adapter {name}": path for name, path in self.bundle.shared.items()}
        return found

    def settings(self) -> dict[str, Any]:
        """What decides the artifact beside its inputs, for its manifest."""
        found: dict[str, Any] = {"runtime": self.runtime}
        found |= {"bundle": True} if self.bundle is not None else {}
        found |= {"context": self.context, **asdict(self.quantization)}
        if self.bundle is not None and self.bundle.modules is not None:
            found["modules"] = sorted(self.bundle.modules)
        return found
