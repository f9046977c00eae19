"""A worker process that loads an artifact and answers every input line with a measurement.

The first output line is the time to load. A line that names a composition is answered with a turn
of it; ``logits NAME`` with the logits after the prompt.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.export.speed import prompt_of

PROGRAM = "model.pte"


class Turn(NamedTuple):
    """One turn of a composition.

    Attributes:
        switch: Seconds to the first token of a one-token prompt.
        prefill: Seconds to prefill the prompt.
        decode: Seconds for the tokens after the first.
        memory: Peak resident bytes so far, minus those before the program was loaded.
    """

    switch: float
    prefill: float
    decode: float
    memory: int


def inputs_of(way: str, directory: Path) -> Callable[[str], tuple[str, list[Any]]]:
    """The method of a composition, and its inputs besides tokens and position."""
    if way in ("methods", "cached"):
        return lambda name: (name, [])
    if way == "folded":
        return lambda name: ("forward", [])
    from benchmarks.bundles.inputs import Factors

    factors = Factors(directory)
    return lambda name: ("forward", factors.of(name))


class Held:
    """A loaded program.

    Args:
        way: ``folded``, ``methods``, ``cached`` (methods that share packed weights) or ``inputs``.
        directory: Holds ``model.pte``.
        threads: Threads of ExecuTorch's pool.
        first: The composition to load first.
    """

    def __init__(self, way: str, directory: Path, threads: int, first: str) -> None:
        import executorch.extension.llm.custom_ops.custom_ops
        import executorch.kernels.quantized  # noqa: F401
        from executorch.extension.pybindings import portable_lib

        portable_lib._unsafe_reset_threadpool(threads)
        if way == "cached":
            share_packed_weights()
        self._inputs_of = inputs_of(way, directory)
        self._before = _resident()
        start = time.perf_counter()
        self._module = portable_lib._load_for_executorch(str(directory / PROGRAM))
        self.forward(first, [0], 0)
        self.seconds = time.perf_counter() - start

    @property
    def memory(self) -> int:
        """Peak resident bytes so far, minus those before loading."""
        return _resident("VmHWM") - self._before

    def turn(self, name: str, prompt: list[int], new_tokens: int) -> Turn:
        """Switch to a composition, prefill the prompt and decode ``new_tokens`` tokens."""
        start = time.perf_counter()
        self.forward(name, prompt[:1], 0)
        switched = time.perf_counter()
        token = int(self.forward(name, prompt, 0).argmax())
        first = time.perf_counter()
        for position in range(len(prompt), len(prompt) + new_tokens - 1):
            token = int(self.forward(name, [token], position).argmax())
        over = time.perf_counter()
        return Turn(switched - start, first - switched, over - first, self.memory)

    def forward(self, name: str, tokens: list[int], position: int) -> Any:
        """Logits of the last token, float32 [vocab]."""
        import torch

        method, more = self._inputs_of(name)
        given = [torch.tensor([tokens]), torch.tensor([position]), *more]
        return self._module.run_method(method, given, clone_outputs=False)[0].reshape(-1)


def share_packed_weights() -> None:
    """Make XNNPACK pack weights with equal keys once, which is off by default in executorch 1.5.1.

    C++ has ``executorch::runtime::set_option`` for it but Python has nothing, so the library is
    called directly. An option is 64 bytes of key and a variant: 256 bytes of value, and its type,
    0 for a bool.
    """
    import executorch.extension.pybindings as bindings

    path = Path(next(iter(bindings.__path__))).parents[1] / "lib" / "libexecutorch.so"
    name = "_ZN10executorch7runtime10set_optionEPKcNS0_4SpanINS0_13BackendOptionEEE"
    set_option = ctypes.CDLL(str(path))[name]
    set_option.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    option = b"weight_cache_enabled".ljust(64, b"\0") + b"\1".ljust(260, b"\0")
    if set_option(b"XnnpackBackend", option, 1):
        raise RuntimeError("XNNPACK refused the option weight_cache_enabled")


def _resident(field: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def work(
    way: str, directory: Path, first: str, threads: int, prompt_tokens: int, new_tokens: int
) -> None:
    """Load an artifact and answer input lines.

    ExecuTorch also prints to standard output; its output is redirected to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prompt = prompt_of(prompt_tokens)
    held = Held(way, directory, threads, first)
    print(json.dumps([held.seconds, held.memory]), file=answers, flush=True)
    for line in sys.stdin:
        what, _, name = line.strip().rpartition(" ")
        found: Any
        if what == "logits":
            found = held.forward(name, prompt, 0).tolist()
        else:
            found = held.turn(name, prompt, new_tokens)
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    _, _way, _directory, _first, *_numbers = sys.argv
    work(_way, Path(_directory), _first, *map(int, _numbers))
