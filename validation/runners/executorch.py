"""Run an ExecuTorch artifact: token by token, and with the stock LLM runner."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from caliport.core.directories import check_recorded
from caliport.core.errors import InputError
from caliport.core.files import TOKENIZER
from caliport.core.untrusted import check_regular, number, read_object
from caliport.export import runtime as runtimes
from caliport.export.artifact import Artifact
from caliport.export.runtime import Rounding
from caliport.validation.runners.engine import Differing, Engine

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from caliport.export.decoder.shipped import ShippedDecoder

NAME = "executorch"
BASE_METHOD = "forward"
_MOST = 2**31 - 1

_loaded: weakref.WeakSet[ExecuTorchRunner] = weakref.WeakSet()


class ExecuTorchRunner:
    """An ExecuTorch program with its key-value cache, fed token by token.

    Attributes:
        name: Names the runner in reasons and reports.
        context: Most tokens that the cache holds.
        threads: Threads of ExecuTorch's pool, which delegates and operators share.
    """

    def __init__(
        self, directory: Path, threads: int | None = None, method: str = BASE_METHOD
    ) -> None:
        """Load the one ``.pte`` of a directory.

        Args:
            directory: An artifact directory, or one with a program of another tool:
                ``forward(tokens [1, n], position)``, where the position is that of the first token
                or [n], of each, gives logits of the last token or of all.
            threads: Threads to run with; default ExecuTorch's own choice. The pool belongs to the
                process: while a runner lives, others must ask for the same number.
            method: Which of the program's methods to run; a bundle has one for each composition.

        Raises:
            InputError: No program there, no such method in it, one that cannot be loaded, or
                another number of threads than living runners use.
        """
        check_recorded(directory)
        self.name = "ExecuTorch"
        self._directory = directory
        self._program = program_in(directory)
        self._module = _load(self._program, threads)
        if method not in (methods := self._module.method_names()):
            listed = ", ".join(sorted(n for n in methods if not n.startswith(("get_", "use_"))))
            raise InputError(f"{directory}: has no method {method!r}, expected one of {listed}")
        self._method = method
        longest = "get_max_context_len"
        self.context = self._constant(longest if longest in methods else "get_max_seq_len")
        with _native(self._program, "cannot be run"):
            positions = self._module.method_meta(method).input_tensor_meta(1).sizes()
            self._every = tuple(positions) != (1,)
            self._vocabulary = self._run([0], 0).shape[-1]  # loads it, which packs the weights
        number(self.context, f"{self._program}: its context", 1, _MOST, whole=True)
        self._position = 0
        self.threads = int(binding()._threadpool_get_thread_count())
        _loaded.add(self)

    def prefill(self, tokens: list[int]) -> np.ndarray:
        """Clear the cache, read ``tokens``; logits after the last, float32 [vocab].

        Raises:
            InputError: No tokens, more than the context, or one outside the vocabulary.
        """
        self.reset()
        return self.extend(tokens)

    def step(self, token: int) -> np.ndarray:
        """Read one more token; logits after it, float32 [vocab].

        Raises:
            InputError: The context is full, or the token is outside the vocabulary.
        """
        return self.extend([token])

    def extend(self, tokens: list[int]) -> np.ndarray:
        """Read more tokens at once; logits after the last, float32 [vocab].

        Raises:
            InputError: As ``prefill``.
        """
        end = self._position + len(tokens)
        if not tokens or end > self.context:
            room = self.context - self._position
            raise InputError(
                f"{self._directory}: {len(tokens)} tokens after {self._position}, "
                f"expected 1 to {room} within its context of {self.context}"
            )
        odd = [token for token in tokens if not 0 <= token < self._vocabulary]
        if odd:
            raise InputError(
                f"{self._directory}: token {odd[0]}, expected 0 to {self._vocabulary - 1}"
            )
        logits = self._run(tokens, self._position)[-1]
        self._position = end
        return logits

    def reset(self) -> None:
        """Clear the cache.

        Attention only looks at positions before its own, so starting again at 0 is enough.
        """
        self._position = 0

    def _run(self, tokens: list[int], position: int) -> np.ndarray:
        """Logits float32 [1 or n, vocab]."""
        import torch

        end = position + (len(tokens) if self._every else 1)
        inputs = [torch.tensor([tokens]), torch.arange(position, end)]
        logits = self._module.run_method(self._method, inputs)[0]
        return np.asarray(logits.float().flatten(0, -2).numpy())

    def _constant(self, method: str) -> int:
        with _native(self._program, f"has no {method}; expected a decoder with a cache"):
            return int(self._module.run_method(method, [])[0])


def program_in(directory: Path) -> Path:
    """The program of a directory: ``model.pte``, or the only ``.pte`` there is.

    Raises:
        InputError: None, several of which none is ``model.pte``, or not a file of the directory.
    """
    usual = runtimes.get(NAME).program
    found = [directory / usual]
    if not found[0].exists():
        found = sorted(directory.glob("*.pte"))
    if len(found) != 1:
        raise InputError(f"{directory}: {len(found)} .pte files, expected {usual} or exactly one")
    check_regular(found[0], root=directory)
    return found[0]


def generate(directory: Path, prompt_text: str, max_new_tokens: int) -> str:
    """What ExecuTorch's own ``TextLLMRunner`` writes after a prompt, greedily.

    The runner is the C++ behind ``llama_main`` and Android's ``LlmModule``. It reads the tokens
    that ``encode_prompt`` makes: a chat template brings its own begin token as text, so the runner
    is told to add none; without a template it adds one if ``tokenizer.json`` says so. It stops
    after a token of the program's ``get_eos_ids``, at ``max_new_tokens``, or when the context is
    full.

    The process's standard output and error are redirected meanwhile, because the C++ prints to
    them, so do not print from other threads.

    Args:
        directory: An artifact directory with ``model.pte`` and ``tokenizer.json``.
        prompt_text: The whole prompt as ``caliport.core.checkpoints.render_prompt`` gives it.
        max_new_tokens: Most tokens to write.

    Returns:
        The text of the new tokens.

    Raises:
        InputError: A file is missing or cannot be loaded, or the prompt does not fit the context.
    """
    check_recorded(directory)
    program = program_in(directory)
    _load(program, None)
    if not (directory / TOKENIZER).is_file():
        raise InputError(f"{directory}: no {TOKENIZER}; expected an artifact with its tokenizer")
    with _redirected():
        from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    config = GenerationConfig(
        echo=False,
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        num_bos=0 if _has_chat_template(directory) else 1,
        num_eos=0,
    )
    pieces: list[str] = []
    with _native(program, "cannot be run by TextLLMRunner"):
        runner = TextLLMRunner(str(program), str(directory / TOKENIZER))
        runner.generate(prompt_text, config, pieces.append)
    return "".join(pieces)


def _has_chat_template(directory: Path) -> bool:
    settings = directory / "tokenizer_config.json"
    return (directory / "chat_template.jinja").is_file() or (
        settings.is_file() and "chat_template" in read_object(settings)
    )


def _load(path: Path, threads: int | None) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected an ExecuTorch program")
    runtime = binding()
    _set_threads(runtime, threads)
    with _native(path, "not loadable as an ExecuTorch program"):
        module = runtime._load_for_executorch(str(path))
        module.method_names()  # the file is read only now
    return module


def binding() -> ModuleType:
    """ExecuTorch's Python binding, with the operators that our programs call registered.

    Only its libraries are loaded. Their Python modules (``portable_lib``, ``custom_ops``) import
    ``executorch.exir`` and torch's compiler beside: six times the seconds and 150 MB more.
    """
    with _redirected():
        import executorch.extension.llm.custom_ops as operators
        import executorch.kernels.quantized  # noqa: F401  loads its library
        import torch
        from executorch.extension.pybindings import _C

        (library,) = Path(operators.__path__[0]).glob("*custom_ops_aot_lib.*")
        torch.ops.load_library(library)
        _C._threadpool_get_thread_count()  # makes the pool, which logs what it looks for
    return _C


def _set_threads(runtime: ModuleType, threads: int | None) -> None:
    """Resize the process's pool.

    executorch 1.5.1 keeps a bare pointer to the pool in every loaded XNNPACK delegate and frees
    the pool when it is resized, so it must not be resized under a loaded program.
    """
    current = runtime._threadpool_get_thread_count()
    if threads is None or threads == current:
        return
    if threads < 1:
        raise InputError(f"threads: found {threads}, expected 1 or more")
    if len(_loaded):
        raise InputError(
            f"threads: found {threads}, expected {current} as long as runners with {current} live"
        )
    with _redirected():
        runtime._unsafe_reset_threadpool(threads)


@contextlib.contextmanager
def _native(path: Path, problem: str) -> Iterator[None]:
    """Turn a failure of the C++ runtime into one line, with what it logged as the reason."""
    log = b""
    try:
        with _redirected() as read:
            try:
                yield
            finally:
                log = read()
    except RuntimeError as error:
        raise InputError(f"{path}: {problem} ({_reason(log, error)})") from error


def _reason(log: bytes, error: Exception) -> str:
    """Operators that are missing, or the first logged line without its source position."""
    text = log.decode(errors="replace")
    if missing := re.findall(r"Missing operator: \[\d+\] (\S+)", text):
        return f"the runtime lacks operators that it calls: {', '.join(dict.fromkeys(missing))}"
    lines = re.findall(r"^\[\w+\.\w+:\d+\] (.+)$", text, re.MULTILINE)
    return " ".join((lines or [str(error)])[0].split())[:200]


@contextlib.contextmanager
def _redirected() -> Iterator[Callable[[], bytes]]:
    """Send standard output and error, C++'s and Python's, to a file; yields what reads it.

    Both, because ExecuTorch's binding writes part of its log through ``sys.stderr``.
    """
    flush_c = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file, contextlib.ExitStack() as undo:
        for descriptor in (1, 2):
            kept = os.dup(descriptor)
            undo.callback(os.close, kept)
            undo.callback(os.dup2, kept, descriptor)
            os.dup2(file.fileno(), descriptor)
        text = io.TextIOWrapper(file, write_through=True)
        undo.callback(text.detach)
        undo.callback(flush_c, None)
        undo.enter_context(contextlib.redirect_stdout(text))
        undo.enter_context(contextlib.redirect_stderr(text))

        def read() -> bytes:
            text.flush()
            flush_c(None)
            return os.pread(file.fileno(), 1 << 16, 0)

        yield read


class ExecuTorchEngine:
    """See ``caliport.validation.runners.engine.Engine``."""

    stock = "TextLLMRunner"
    alternatives: Mapping[str, str] = {}
    runs_in_float = False
    arm_rounding: Mapping[str, Rounding] = {}

    def preload(self) -> None:
        """Load the binding and its operators."""
        binding()

    def try_program(self, artifact: Artifact) -> None:
        """Run the program once in its own process, since a damaged one may crash that."""
        from caliport.validation.runners.trial import try_program

        try_program(program_in(artifact.directory))

    def open(
        self, artifact: Artifact, threads: int, composition: str | None, runner: str
    ) -> ExecuTorchRunner:
        """A composition is a method of the program."""
        return ExecuTorchRunner(artifact.directory, threads, composition or BASE_METHOD)

    def open_float(self, artifact: Artifact, threads: int) -> ExecuTorchRunner:
        """Not possible: XNNPACK's kernels always round."""
        raise InputError(f"{artifact.directory}: ExecuTorch cannot leave out rounding activations")

    def selector(self, artifact: Artifact, composition: str | None) -> str | None:
        """The name of the method."""
        return composition

    def generate(
        self, artifact: Artifact, text: str, max_new_tokens: int, composition: str | None
    ) -> str:
        """By ``TextLLMRunner``, which runs ``forward``."""
        return generate(artifact.directory, text, max_new_tokens)

    def gap(self, composition: str | None) -> str | None:
        """The binding runs ``forward`` alone.

        ``create_text_llm_runner`` takes the name of a method in C++; the Python binding of
        executorch 1.5.1 leaves it out.
        """
        if composition is None:
            return None
        return (
            "TextLLMRunner's Python binding runs the method forward alone, the bundle's base; "
            f"{composition} was not checked with it"
        )

    def ends(self, artifact: Artifact) -> list[int]:
        """The program's ``get_eos_ids``."""
        from caliport.validation.runners.program import Program

        return Program(program_in(artifact.directory)).constant_method("get_eos_ids")

    def differing_settings(
        self, artifact: Artifact, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> list[str]:
        """The program's constant methods against those that the exporter gives the base."""
        from caliport.export.executorch.lower import constant_methods
        from caliport.validation.runners.program import Program

        program = Program(program_in(artifact.directory))
        expected = constant_methods(model, artifact.context or 0, [], tokenizer.bos_token_id)
        return sorted(
            name
            for name, value in expected.items()
            if name != "get_eos_ids" and program.constant_method(name) != [value]
        )

    def integers(
        self, artifact: Artifact, shapes: Mapping[str, tuple[int, int]]
    ) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """See ``Engine.integers``."""
        from caliport.validation.runners.program import integers

        return integers(program_in(artifact.directory), artifact.calibrated, shapes)

    def differing_weights(
        self, artifact: Artifact, decoder: ShippedDecoder, ranks: Mapping[str, int]
    ) -> Differing:
        """By hash among named data and constants."""
        from caliport.validation.runners.program import differing_weights

        return differing_weights(program_in(artifact.directory), decoder, ranks)


ENGINE: Engine = ExecuTorchEngine()
