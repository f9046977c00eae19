"""One small protocol for everything that turns tokens into logits, and greedy decoding over it."""

from __future__ import annotations

import pkgutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from caliport_core.directories import MANIFEST, read_manifest
from caliport_core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RUNTIMES = ("executorch", "onnx")
PLAIN, GENAI = "plain", "genai"
"""What runs an artifact: its runtime alone, or onnxruntime-genai."""


@runtime_checkable
class Runner(Protocol):
    """A model with its key-value cache, fed token by token.

    Attributes:
        name: Names the runner in reasons and reports.
        context: Most tokens that the cache holds.
    """

    name: str
    context: int

    def prefill(self, tokens: list[int]) -> np.ndarray:
        """Forget what came before, read ``tokens``; logits after the last, float32 [vocab]."""
        ...

    def step(self, token: int) -> np.ndarray:
        """Read one more token; logits after it, float32 [vocab]."""
        ...

    def reset(self) -> None:
        """Forget all tokens read so far."""
        ...


class EagerRunner:
    """A transformers causal language model as a ``Runner``, with a cache of its own.

    Args:
        model: In eval mode, quantized or not.
        name: Names it in reasons and reports.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.name = name
        self.model = model
        self.context = int(model.config.max_position_embeddings)
        self._cache: Any = None

    def prefill(self, tokens: list[int]) -> np.ndarray:
        """Forget what came before, read ``tokens``; logits after the last, float32 [vocab]."""
        self.reset()
        return self._forward(tokens)

    def step(self, token: int) -> np.ndarray:
        """Read one more token; logits after it, float32 [vocab]."""
        return self._forward([token])

    def reset(self) -> None:
        """Forget all tokens read so far."""
        self._cache = None

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits after every token in one pass without a cache, float32 [len(tokens), vocab].

        No cache takes part, so a reference made this way cannot share a cache's faults.
        """
        import torch

        with torch.no_grad():
            out = self.model(torch.tensor([list(tokens)]), use_cache=False)
        return np.asarray(out.logits[0].float().numpy())

    def _forward(self, tokens: Sequence[int]) -> np.ndarray:
        import torch

        with torch.no_grad():
            out = self.model(
                torch.tensor([list(tokens)]),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = out.past_key_values
        return np.asarray(out.logits[0, -1].float().numpy())


def greedy(
    runner: Runner, prompt: list[int], max_new_tokens: int, eos_ids: Collection[int]
) -> list[int]:
    """The most likely token at every step, lowest id first among equals.

    Returns:
        At most ``max_new_tokens`` tokens, fewer where the context is full; the token of
        ``eos_ids`` that ended the text, if one did, is the last.
    """
    logits = runner.prefill(prompt)
    room = min(max_new_tokens, runner.context - len(prompt))
    tokens: list[int] = []
    while len(tokens) < room:
        tokens.append(int(np.argmax(logits)))
        if tokens[-1] in eos_ids or len(tokens) == room:
            break
        logits = runner.step(tokens[-1])
    return tokens


def is_foreign(directory: Path) -> bool:
    """Whether a directory holds a program that no manifest of ours vouches for."""
    there = (directory / "genai_config.json").is_file() or any(directory.glob("*.pte"))
    return there and not (directory / MANIFEST).is_file()


def artifact_form(directory: Path) -> tuple[str, str]:
    """Runtime and precision of an artifact, from its manifest.

    Without a manifest, a directory with a ``genai_config.json`` or a ``.pte`` is another tool's, of
    the precision ``unknown``.

    Raises:
        InputError: Nothing that can be run, or a manifest without a known runtime and precision.
    """
    if is_foreign(directory):
        onnx = (directory / "genai_config.json").is_file()
        return "onnx" if onnx else "executorch", "unknown"
    manifest = read_manifest(directory)
    runtime, precision = manifest.get("runtime"), manifest.get("precision")
    if runtime not in RUNTIMES:
        raise InputError(
            f"{directory}/manifest.json: runtime is {runtime!r}, expected executorch or onnx"
        )
    if not isinstance(precision, str):
        raise InputError(
            f"{directory}/manifest.json: precision is {precision!r}, expected fp32, int8 or int4"
        )
    return runtime, precision


def compositions_of(directory: Path) -> tuple[str, ...] | None:
    """Names of the compositions of a bundle; None for an artifact that is none.

    Raises:
        InputError: No manifest.
    """
    if is_foreign(directory):
        return None
    bundle = read_manifest(directory).get("bundle")
    return None if bundle is None else tuple(bundle["compositions"])


def open_runner(
    directory: Path, threads: int, bundled: str | None = None, runner: str = PLAIN
) -> Runner:
    """What runs an artifact; it checks the artifact's hashes first.

    Args:
        directory: An artifact directory with its manifest, or one of another tool.
        threads: Threads of the runtime's own pool.
        bundled: Of a bundle, the composition to run; None for its base alone.
        runner: ``plain``, the artifact's runtime itself; ``genai``, onnxruntime-genai; or
            ``MODULE:FUNCTION``, an importable function of (directory, threads, bundled) that
            returns any ``Runner``.

    Raises:
        InputError: Not an artifact, one whose files are not those that its manifest records, one
            that its runtime cannot load, or one without such a composition; or see
            ``check_choice``.
    """
    check_choice(directory, runner)
    if ":" in runner:
        found = pkgutil.resolve_name(runner)(directory, threads, bundled)
        if not isinstance(found, Runner):
            raise InputError(
                f"--runner {runner}: gave {type(found).__name__}, expected an object with name, "
                "context, prefill, step and reset"
            )
        return found
    runtime, _ = artifact_form(directory)
    if runtime == "executorch":
        from validation.executorch_runner import BASE_METHOD, ExecuTorchRunner

        return ExecuTorchRunner(directory, threads, bundled or BASE_METHOD)
    if runner == GENAI:
        from validation.genai_runner import GenaiRunner

        return GenaiRunner(directory, threads, adapter=_adapter_file(directory, bundled))
    from validation.onnx_runner import OnnxRunner

    return OnnxRunner(directory, threads, adapter=_adapter_file(directory, bundled))


def check_choice(directory: Path, runner: str) -> None:
    """Refuse a runner that is not known, or that cannot run this artifact, before any work.

    Raises:
        InputError: See above, or not an artifact.
    """
    runtime, _ = artifact_form(directory)
    if ":" in runner:
        try:
            pkgutil.resolve_name(runner)
        except (ImportError, AttributeError, ValueError) as error:
            raise InputError(f"--runner {runner}: {error}; expected MODULE:FUNCTION") from None
    elif runner not in (PLAIN, GENAI):
        raise InputError(f"--runner is {runner!r}, expected plain, genai or MODULE:FUNCTION")
    elif runner == GENAI and runtime != "onnx":
        raise InputError(
            f"{directory}: is an ExecuTorch program, which onnxruntime-genai cannot run; expected "
            "--runner plain"
        )


def stock_generate(
    directory: Path, text: str, max_new_tokens: int, bundled: str | None = None
) -> str:
    """What the runtime's own stock runner writes after ``text``, greedily.

    ``TextLLMRunner`` for ExecuTorch, ``onnxruntime_genai`` for ONNX. Both check the artifact's
    hashes first.

    Args:
        directory: An artifact directory with its manifest.
        text: The whole prompt.
        max_new_tokens: Most tokens to write.
        bundled: Of a bundle for ONNX, the composition to run; see ``stock_gap``.

    Raises:
        InputError: As ``open_runner``, or a composition that the stock runner cannot run.
    """
    if (gap := stock_gap(directory, bundled)) is not None:
        raise InputError(f"{directory}: {gap}")
    runtime, _ = artifact_form(directory)
    if runtime == "executorch":
        from validation import executorch_runner

        return executorch_runner.generate(directory, text, max_new_tokens)
    from validation import onnx_runner

    adapter = _adapter_file(directory, bundled)
    return onnx_runner.generate(directory, text, max_new_tokens, adapter)


def stock_gap(directory: Path, bundled: str | None) -> str | None:
    """Why the stock runner cannot run this, or None where it can.

    ``create_text_llm_runner`` takes the name of a method in C++; the Python binding of executorch
    1.5.1 leaves it out and runs ``forward``.
    """
    if bundled is None or artifact_form(directory)[0] != "executorch":
        return None
    return (
        "TextLLMRunner's Python binding runs the method forward alone, the bundle's base; "
        f"{bundled} was not checked with it"
    )


def _adapter_file(directory: Path, bundled: str | None) -> Path | None:
    if bundled is None:
        return None
    known = read_manifest(directory).get("bundle", {}).get("compositions", {})
    if bundled not in known:
        listed = ", ".join(known) or "none"
        raise InputError(f"{directory}: has no composition {bundled!r}, expected one of {listed}")
    return directory / str(known[bundled]["file"])
