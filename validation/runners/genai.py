"""Run an ONNX directory through onnxruntime-genai, token by token: the logits that its apps see."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from caliport.core.errors import InputError
from caliport.validation.runners.genai_files import (
    check_room,
    genai_adapters,
    genai_model,
    line_of,
    read_config,
)


class GenaiRunner:
    """An ONNX artifact, or another tool's directory, as a ``Runner`` through onnxruntime-genai.

    Its caches, masks and positions are onnxruntime-genai's own, so this checks what
    ``genai_config.json`` says as well as the graph.

    Args:
        directory: ``genai_config.json``, the graph that it names and the tokenizer beside it.
        threads: Threads of ONNX Runtime's pool; None for what the configuration says.
        adapter: Of a bundle, the ``.onnx_adapter`` file of a composition; None for its base alone.

    Attributes:
        name: Names the runner in reasons and reports.
        context: Most tokens that the artifact is made for.

    Raises:
        InputError: A file is missing, or onnxruntime-genai cannot load the directory.
    """

    def __init__(
        self, directory: Path, threads: int | None = None, adapter: Path | None = None
    ) -> None:
        self.name = "onnxruntime-genai"
        self.context = int(read_config(directory)["model"]["context_length"])
        self._directory = directory
        self._model = genai_model(directory, threads)
        self._adapters = None if adapter is None else genai_adapters(self._model, adapter)
        self._adapter = "" if adapter is None else adapter.stem
        self.reset()

    def prefill(self, tokens: list[int]) -> np.ndarray:
        """Clear the cache, read ``tokens``; logits after the last, float32 [vocab].

        Raises:
            InputError: As ``extend``.
        """
        self.reset()
        return self.extend(tokens)

    def step(self, token: int) -> np.ndarray:
        """Read one more token; logits after it, float32 [vocab].

        Raises:
            InputError: As ``extend``.
        """
        return self.extend([token])

    def extend(self, tokens: Sequence[int]) -> np.ndarray:
        """Read some more tokens in one pass; logits after the last, float32 [vocab].

        Raises:
            InputError: No tokens, more than the context has room for, or one that the graph
                refuses.
        """
        check_room(len(tokens), self._length, self.context)
        try:
            self._generator.append_tokens(np.array([list(tokens)], np.int32))
            logits = self._generator.get_logits()
        except Exception as error:
            raise InputError(
                f"{self._directory}: onnxruntime-genai cannot run it ({line_of(error)})"
            ) from error
        self._length += len(tokens)
        return np.asarray(logits, np.float32).reshape(-1, logits.shape[-1])[-1]

    def reset(self) -> None:
        """Clear the cache, as apps do for a new text: with a new generator.

        Raises:
            InputError: The configuration does not fit the graph.
        """
        import onnxruntime_genai as genai

        try:
            settings = genai.GeneratorParams(self._model)
            settings.set_search_options(max_length=self.context, do_sample=False)
            self._generator = genai.Generator(self._model, settings)
            if self._adapters is not None:
                self._generator.set_active_adapter(self._adapters, self._adapter)
        except Exception as error:
            raise InputError(
                f"{self._directory}: onnxruntime-genai cannot run it ({line_of(error)})"
            ) from error
        self._length = 0
