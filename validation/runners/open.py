"""XXX."""

from __future__ import annotations

import pkgutil
from pathlib import Path

from caliport.core.errors import InputError
from caliport.validation.artifact import _adapter_file, artifact_form
from caliport.validation.runners.runner import Runner

PLAIN, GENAI = "plain", "genai"
"""What runs an artifact: its runtime alone, or onnxruntime-genai."""


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
        from caliport.validation.runners.executorch import BASE_METHOD, ExecuTorchRunner

        return ExecuTorchRunner(directory, threads, bundled or BASE_METHOD)
    if runner == GENAI:
        from caliport.validation.runners.genai import GenaiRunner

        return GenaiRunner(directory, threads, adapter=_adapter_file(directory, bundled))
    from caliport.validation.runners.onnx import OnnxRunner

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
        from caliport.validation.runners import executorch as executorch_runner

        return executorch_runner.generate(directory, text, max_new_tokens)
    from caliport.validation.runners import onnx as onnx_runner

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
