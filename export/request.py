"""An export request: everything that determines one artifact, in one frozen object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from caliport.core.prompts import recorded_prompt
from caliport.export.quantization.choices import Goal, Quantization
from caliport.export.quantization.text import CalibrationText


@dataclass(frozen=True)
class Bundle:
    """Compositions that stay beside one frozen base.

    Attributes:
        compositions: PEFT LoRA directories by composition name.
        shared: Single-task adapters by name, stored once for all compositions that contain them.
        modules: Target modules: name endings of the linear layers that compositions may update,
            such as ``q_proj``; None for all in the decoder's layers. The layers that the given
            compositions update are always included.
    """

    compositions: Mapping[str, Path]
    shared: Mapping[str, Path] = field(default_factory=dict)
    modules: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Request:
    """One artifact to make: a fold of at most one adapter, or a bundle of compositions.

    Attributes:
        base: A Hugging Face directory or hub name of a decoder.
        runtime: Name of a runtime (``caliport.export.runtime.names``).
        quantization: How the base, including a folded adapter, is quantized.
        context: Length of the key-value cache in tokens, prompt and answer together; None for the
            base's maximum.
        adapter: PEFT LoRA directory to fold in; None exports only the base.
        bundle: Compositions to keep beside the base; None for a fold.
        text: Calibration text, for a quantizer that measures on text what layers are fed, or for
            a goal.
        goal: What decides which layers of ``int4`` stay at 8 bits, besides those that
            ``quantization`` names; None for no others.
    """

    base: str | Path
    runtime: str
    quantization: Quantization
    context: int | None = None
    adapter: Path | None = None
    bundle: Bundle | None = None
    text: CalibrationText | None = None
    goal: Goal | None = None

    @property
    def label(self) -> str:
        """Runtime and precision, for messages."""
        return f"{self.runtime} {self.quantization.precision}"

    def adapters(self) -> list[Path]:
        """All adapter directories that the export reads."""
        if self.bundle is None:
            return [] if self.adapter is None else [self.adapter]
        return [*self.bundle.compositions.values(), *self.bundle.shared.values()]

    def inputs(self) -> dict[str, Path | str]:
        """All inputs of the artifact, by their labels in its manifest."""
        found: dict[str, Path | str] = {"base": self.base}
        if self.adapter is not None:
            found["adapter"] = self.adapter
        if self.bundle is not None:
            found |= {f"composition {name}": p for name, p in self.bundle.compositions.items()}
            found |= {f"adapter {name}": path for name, path in self.bundle.shared.items()}
        return found if self.text is None else found | self.text.inputs()

    def settings(self) -> dict[str, Any]:
        """Everything besides the inputs that determines the artifact, for its manifest."""
        found: dict[str, Any] = {"runtime": self.runtime}
        found |= {"bundle": True} if self.bundle is not None else {}
        found |= {"context": self.context, **asdict(self.quantization)}
        if found["quantizer"] is None:
            del found["quantizer"]
        if not found["tune_norms"]:
            del found["tune_norms"]
        if self.text is not None:
            found["calibration"] = self.text.settings()
        if self.goal is not None:
            found["goal"] = asdict(self.goal)
        if self.bundle is not None and self.bundle.modules is not None:
            found["modules"] = sorted(self.bundle.modules)
        if prompts := self._prompts():
            found["prompts"] = prompts
        return found

    def _prompts(self) -> dict[str, str]:
        """The adapters' recorded prompts, which the inputs' hashes leave out."""
        directories = {} if self.bundle is None else dict(self.bundle.compositions)
        if self.adapter is not None:
            directories["adapter"] = self.adapter
        prompts = {name: recorded_prompt(Path(path)) for name, path in directories.items()}
        return {name: prompt for name, prompt in prompts.items() if prompt is not None}
