"""ExecuTorch on a device: the stock ``llama_main``, or our Python on Linux."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from caliport.android_harness.runners.by_runtime import DeviceRuntime
from caliport.android_harness.runners.kinds import JobRunner
from caliport.core.errors import InputError
from caliport.core.untrusted import mapping, number, parse_json
from caliport.validation.records.record import Amount, Count, Record
from caliport.validation.runners.executorch import BASE_METHOD, NAME

if TYPE_CHECKING:
    from caliport.android_harness.device.facts import Facts

PYTHON = "caliport-executorch-python"
"""The name of our Python runner in its results, before its version."""
_LLAMA_MAIN = Path("build/llama_main")
_OBSERVER = "PyTorchObserver "
_UNIT = "SCALING_FACTOR_UNITS_PER_SECOND"
_FIGURES = (
    *("prompt_tokens", "generated_tokens", "model_load_start_ms", "model_load_end_ms"),
    *("inference_start_ms", "first_token_ms", "inference_end_ms"),
)
_LATEST = 10**15  # milliseconds; the time since 1970 has 13 digits


class ExecuTorchOnDevice:
    """See ``caliport.android_harness.runners.by_runtime.DeviceRuntime``."""

    python = PYTHON

    def default_runner(self, device: Facts, llama_main: Path | None) -> JobRunner | Path:
        """``llama_main``, if it was built; else, on Linux, our Python."""
        if llama_main is not None or _LLAMA_MAIN.is_file():
            return llama_main or _LLAMA_MAIN
        if device.kind == "linux":
            return executorch_runner()
        raise InputError(
            f"device {device.serial}: no runner for .pte files; expected --llama-main FILE, "
            f"ExecuTorch's own, built for {device.abi}"
        )


DEVICE: DeviceRuntime = ExecuTorchOnDevice()


def executorch_runner() -> JobRunner:
    """Our Python around ExecuTorch's binding, for a Linux device that shares this environment."""
    command = (sys.executable, "-P", "-m", "caliport.android_harness.runners.executorch_python")
    return JobRunner(NAME, None, command)


class LlamaMain(Record):
    """What ``llama_main`` printed.

    Attributes:
        text: The new text, without the prompt that it repeats.
        prompt_tokens: Of the prompt.
        decoded_tokens: After the first, which comes with the prompt.
        load_seconds: Of loading.
        first_token_seconds: From the start, which tokenizes the prompt, to the first token.
        decode_seconds: From then to the end, in which the others came.
    """

    text: str
    prompt_tokens: Count
    decoded_tokens: Count
    load_seconds: Amount
    first_token_seconds: Amount
    decode_seconds: Amount


def llama_main_flags(
    program: str,
    tokenizer: str,
    prompt: str,
    max_new_tokens: int,
    threads: int,
    method: str | None = None,
    bos: int = 0,
) -> list[str]:
    """Flags of ``llama_main`` (``examples/models/llama/main.cpp`` of ExecuTorch), greedy.

    Args:
        program: The ``.pte``, as the device names it.
        tokenizer: ``tokenizer.json``, as the device names it.
        prompt: The whole prompt.
        max_new_tokens: Most tokens to write.
        threads: Of ExecuTorch's pool.
        method: Of a bundle, the composition's; None for its base, or for a fold.
        bos: Begin tokens to put before the prompt. Some versions of ``llama_main`` ignore it.
    """
    return [
        f"--model_path={program}",
        f"--tokenizer_path={tokenizer}",
        f"--prompt={prompt}",
        "--temperature=0",
        f"--max_new_tokens={max_new_tokens}",
        f"--cpu_threads={threads}",
        f"--method_name={method or BASE_METHOD}",
        f"--num_bos={bos}",
    ]


def parse_llama_main(output: str, prompt: str) -> LlamaMain:
    """What the standard output of ``llama_main`` says: the prompt, the text, one line of figures.

    Raises:
        InputError: It has no such line, or one without the figures that are needed.
    """
    text, found, line = output.rpartition(_OBSERVER)
    try:
        said = mapping(parse_json(line.partition("\n")[0] if found else "{}", "figures"), "figures")
        told = {name: number(said.get(name), name, 0, _LATEST, whole=True) for name in _FIGURES}
        unit = number(said.get(_UNIT), _UNIT, 1, _LATEST)
        return LlamaMain(
            text=text.removeprefix(prompt).removesuffix("\n"),
            prompt_tokens=told["prompt_tokens"],
            decoded_tokens=told["generated_tokens"],
            load_seconds=(told["model_load_end_ms"] - told["model_load_start_ms"]) / unit,
            first_token_seconds=(told["first_token_ms"] - told["inference_start_ms"]) / unit,
            decode_seconds=(told["inference_end_ms"] - told["first_token_ms"]) / unit,
        )
    except (InputError, ValidationError):
        shown = " ".join((line if found else output).split())[-80:]
        raise InputError(
            f"llama_main: found {shown!r}, expected a line of {_OBSERVER.strip()} with its figures"
        ) from None
