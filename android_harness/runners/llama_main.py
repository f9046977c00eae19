"""What ``llama_main`` does, for Linux devices.

    python -m caliport.android_harness.runners.llama_main

It takes the flags of ExecuTorch's ``llama_main`` and prints what that prints, since
``TextLLMRunner`` is the C++ behind both. Its Python binding (executorch 1.5.1) runs the method
``forward`` alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from caliport.core.errors import InputError
from caliport.validation.runners.executorch import BASE_METHOD, binding


def generate(flags: argparse.Namespace) -> None:
    """Write the prompt, the text after it and the line of figures to the standard output.

    Raises:
        InputError: A file that is missing or cannot be run, or another method than ``forward``.
    """
    if flags.method_name != BASE_METHOD:
        raise InputError(
            f"method_name: found {flags.method_name}, expected {BASE_METHOD}; TextLLMRunner's "
            "Python binding runs no other"
        )
    for path in (flags.model_path, flags.tokenizer_path):
        if not path.is_file():
            raise InputError(f"{path}: no such file")
    runtime = binding()
    if flags.cpu_threads > 0:
        runtime._unsafe_reset_threadpool(flags.cpu_threads)
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    config = GenerationConfig(
        max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        num_bos=flags.num_bos,
    )
    try:
        runner = TextLLMRunner(str(flags.model_path), str(flags.tokenizer_path))
        if flags.warmup:
            runner.generate(flags.prompt, config)
            runner.reset()
        runner.generate(flags.prompt, config)
    except RuntimeError as error:
        raise InputError(f"{flags.model_path}: TextLLMRunner cannot run it ({error})") from error


def main() -> int:
    """Read the flags and generate; the exit code."""
    parser = argparse.ArgumentParser(prog="llama_main")
    parser.add_argument("--model_path", type=Path, required=True)
    parser.add_argument("--tokenizer_path", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--max_new_tokens", type=int, default=-1)
    parser.add_argument("--cpu_threads", type=int, default=-1)
    parser.add_argument("--method_name", default=BASE_METHOD)
    parser.add_argument("--num_bos", type=int, default=0)
    parser.add_argument("--warmup", action="store_true")
    try:
        generate(parser.parse_args())
    except InputError as error:
        print(f"llama_main: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
