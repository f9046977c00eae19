"""Run an ONNX artifact: logits through ONNX Runtime, text through onnxruntime_genai."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from caliport.core.directories import check_recorded
from caliport.core.errors import InputError
from caliport.core.untrusted import check_regular, shown
from caliport.export.artifact import Artifact
from caliport.export.onnx.files import GENAI_CONFIG
from caliport.export.runtime import Rounding
from caliport.validation.runners.engine import Differing, Engine
from caliport.validation.runners.genai_files import (
    check_room,
    ends_of,
    genai_adapters,
    genai_model,
    line_of,
    read_config,
)
from caliport.validation.runners.graph_files import check_graph, read_graph
from caliport.validation.runners.runner import Runner
from caliport.validation.runners.trial import try_template

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from caliport.export.decoder.shipped import ShippedDecoder

GENAI = "genai"
"""The word for onnxruntime-genai as a runner."""
_MOST = 2**31 - 1  # bytes of an adapter's file
_FOLDER = "session.model_external_initializers_file_folder_path"


class OnnxRunner:
    """An ONNX artifact as a ``Runner``: tokens in, the last token's logits out.

    Args:
        directory: An artifact directory: ``genai_config.json`` and the graph it names.
        threads: Threads of ONNX Runtime's pool; None for its own choice, one a physical core.
        float_activations: Multiply in float32 instead of rounding the inputs of quantized products
            to 8 bits. This is not what ships; it tells a wrong graph from rounding, since without
            rounding, logits equal those of the dequantized eager model to about 1e-5.
        adapter: Of a bundle, the ``.onnx_adapter`` file of a composition; None for its base alone.

    Attributes:
        name: Names the runner in reasons and reports.
        context: Most tokens that the artifact is made for.

    Raises:
        InputError: A file is missing, or ONNX Runtime cannot load the graph.
    """

    def __init__(
        self,
        directory: Path,
        threads: int | None = None,
        float_activations: bool = False,
        adapter: Path | None = None,
    ) -> None:
        import onnxruntime

        check_recorded(directory)
        model = read_config(directory)["model"]
        decoder = model["decoder"]
        self.name = "ONNX Runtime"
        self.context = int(model["context_length"])
        self._past, self._present, shape = _cache(directory, decoder)
        self._inputs, self._outputs = decoder["inputs"], decoder["outputs"]
        self._graph = directory / decoder["filename"]
        self._session = _open(self._graph, threads, float_activations)
        self._check_names()
        self._adapter = None if adapter is None else _read_adapter(adapter)
        self._factors = {} if self._adapter is None else self._adapter.get_parameters()
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._empty = np.zeros(shape, np.float32)
        self._length = 0
        self._caches: list[Any] = []
        self.reset()

    def prefill(self, tokens: list[int]) -> np.ndarray:
        """Clear the cache, read ``tokens``; logits after the last, float32 [vocab]."""
        self.reset()
        return self.extend(tokens)

    def step(self, token: int) -> np.ndarray:
        """Read one more token; logits after it, float32 [vocab]."""
        return self.extend([token])

    def extend(self, tokens: Sequence[int]) -> np.ndarray:
        """Read some more tokens in one pass; logits after the last, float32 [vocab].

        Raises:
            InputError: No tokens, more than the context has room for, or something that the graph
                refuses, such as a token outside its vocabulary.
        """
        check_room(len(tokens), self._length, self.context)
        end = self._length + len(tokens)
        feeds = dict(zip(self._past, self._caches, strict=True)) | self._factors
        feeds[self._inputs["input_ids"]] = self._value(np.array([tokens], np.int64))
        feeds[self._inputs["attention_mask"]] = self._value(np.ones((1, end), np.int64))
        if "position_ids" in self._inputs:  # others count inside the graph
            positions = np.arange(self._length, end, dtype=np.int64)[None]
            feeds[self._inputs["position_ids"]] = self._value(positions)
        names = [self._outputs["logits"], *self._present]
        try:
            logits, *self._caches = self._session.run_with_ort_values(names, feeds)
        except Exception as error:
            raise InputError(
                f"{self._graph}: ONNX Runtime cannot run it ({line_of(error)})"
            ) from error
        self._length = end
        found = logits.numpy()
        if found.ndim != 3 or not found.size:
            raise InputError(
                f"{self._graph}: gives logits {list(found.shape)}, expected [1, tokens, vocabulary]"
            )
        return np.asarray(found[0, -1])

    def reset(self) -> None:
        """Clear the cache."""
        self._length = 0
        self._caches = [self._value(self._empty) for _ in self._past]

    def _check_names(self) -> None:
        """Check the configuration's names, of all of its layers, against the graph's."""
        taken = {entry.name for entry in self._session.get_inputs()}
        fields = ("input_ids", "attention_mask", "position_ids")
        named = {*self._past, *(self._inputs[name] for name in fields if name in self._inputs)}
        given = {entry.name for entry in self._session.get_outputs()}
        lacking = {*self._present, self._outputs["logits"]} - given
        for names, whose in (
            (named - taken, "the graph has no input"),
            (taken - named, f"{GENAI_CONFIG} does not name the graph's input"),
            (lacking, "the graph has no output"),
        ):
            if names:
                raise InputError(
                    f"{self._graph}: {whose} {shown(min(names))}; expected the layers of "
                    f"{GENAI_CONFIG} in the graph, and no others"
                )


def generate(
    directory: Path, prompt_text: str, max_new_tokens: int, adapter: Path | None = None
) -> str:
    """What onnxruntime_genai writes after ``prompt_text``, greedily, special tokens left out.

    Its decoder (0.18) ends the text at the first byte that is not UTF-8.

    Args:
        directory: An artifact directory with its tokenizer files.
        prompt_text: As rendered by the chat template.
        max_new_tokens: Most tokens to write.
        adapter: Of a bundle, the ``.onnx_adapter`` file of a composition; None for its base alone.

    Raises:
        InputError: Not loadable, or no room for the prompt in the context.
    """
    import onnxruntime_genai as genai

    model = genai_model(directory)
    try_template(directory)
    try:
        tokenizer = genai.Tokenizer(model)
    except Exception as error:
        raise InputError(
            f"{directory}: onnxruntime_genai cannot read its tokenizer ({line_of(error)})"
        ) from error
    prompt = [int(token) for token in tokenizer.encode(prompt_text)]
    written = _generate(directory, model, prompt, max_new_tokens, adapter)
    return str(tokenizer.decode(written))


def generate_ids(
    directory: Path, prompt_ids: Sequence[int], max_new_tokens: int, adapter: Path | None = None
) -> list[int]:
    """The tokens that onnxruntime_genai writes after ``prompt_ids``, greedily.

    ``adapter`` as for ``generate``.

    Returns:
        At most ``max_new_tokens`` tokens. onnxruntime_genai 0.18 leaves the token that ended the
        text out.

    Raises:
        InputError: Not loadable, or no room for the prompt in the context.
    """
    return _generate(directory, genai_model(directory), prompt_ids, max_new_tokens, adapter)


def _generate(
    directory: Path,
    model: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    adapter: Path | None,
) -> list[int]:
    import onnxruntime_genai as genai

    context = int(read_config(directory)["model"]["context_length"])
    if not 0 < len(prompt) < context:
        raise InputError(
            f"a prompt of {len(prompt)} tokens; expected 1 to {context - 1}, since the context of "
            f"{directory} is {context}"
        )
    adapters = None if adapter is None else genai_adapters(model, adapter)
    try:
        settings = genai.GeneratorParams(model)
        length = min(context, len(prompt) + max_new_tokens)
        settings.set_search_options(max_length=length, do_sample=False)
        generator = genai.Generator(model, settings)
        if adapter is not None:
            generator.set_active_adapter(adapters, adapter.stem)
        generator.append_tokens(np.array([list(prompt)], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
    except Exception as error:
        raise InputError(
            f"{directory}: onnxruntime_genai cannot run it ({line_of(error)})"
        ) from error


def _cache(
    directory: Path, decoder: Mapping[str, Any]
) -> tuple[list[str], list[str], tuple[int, ...]]:
    """Names of the inputs and of the outputs of keys and values, and the shape of empty ones.

    Raises:
        InputError: The configuration lacks them.
    """
    inputs, outputs = decoder["inputs"], decoder["outputs"]
    try:
        kinds = [
            (inputs["past_key_names"], outputs["present_key_names"]),
            (inputs["past_value_names"], outputs["present_value_names"]),
        ]
        _ = inputs["input_ids"], inputs["attention_mask"], outputs["logits"]
        layers = range(decoder["num_hidden_layers"])
        past, present = (
            [pair[side] % layer for layer in layers for pair in kinds] for side in (0, 1)
        )
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{directory / GENAI_CONFIG}: not of a decoder with keys and values ({line_of(error)})"
        ) from None
    return past, present, (1, decoder["num_key_value_heads"], 0, decoder["head_size"])


def _open(graph: Path, threads: int | None, float_activations: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only, and they come as exceptions too
    if threads is not None:
        options.intra_op_num_threads = threads
    source: str | bytes = str(graph)
    if float_activations:
        source = _without_rounding(graph)
    try:
        if float_activations:
            options.add_session_config_entry(_FOLDER, str(graph.parent))
        # Its fallback is the same provider again, announced on the standard output.
        how: dict[str, Any] = {"providers": ["CPUExecutionProvider"], "enable_fallback": 0}
        return onnxruntime.InferenceSession(source, options, **how)
    except Exception as error:
        raise InputError(f"{graph}: ONNX Runtime cannot load it ({line_of(error)})") from error


def _read_adapter(path: Path) -> Any:
    """A composition's values by the names of the graph's inputs; they lie in what is returned.

    They are fed like other inputs: onnxruntime 1.31 looks at ``RunOptions.add_active_adapter`` in
    ``run`` alone, not in ``run_with_ort_values``.
    """
    import onnxruntime

    check_regular(path, _MOST, path.parent)
    try:
        return onnxruntime.AdapterFormat.read_adapter(str(path))
    except Exception as error:
        raise InputError(f"{path}: not an adapter of ONNX Runtime ({line_of(error)})") from error


def _without_rounding(graph: Path) -> bytes:
    """The graph with every ``MatMulNBits`` set to multiply in float32 (accuracy level 0)."""
    model = read_graph(graph)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 0
    return bytes(model.SerializeToString())


def _fields(config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Every field of a configuration by its name, such as ``model.decoder.head_size``."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        inner = isinstance(value, dict)
        found |= _fields(value, f"{where}{name}.") if inner else {f"{where}{name}": value}
    return found


def _graph_of(artifact: Artifact) -> Path:
    config = read_config(artifact.directory)
    return artifact.directory / str(config["model"]["decoder"]["filename"])


class OnnxEngine:
    """See ``caliport.validation.runners.engine.Engine``."""

    stock = "onnxruntime_genai"
    alternatives: Mapping[str, str] = {GENAI: "onnxruntime-genai"}
    runs_in_float = True
    arm_rounding: Mapping[str, Rounding] = {"int4": "token"}  # KleidiAI's kernels

    def preload(self) -> None:
        """Import ONNX Runtime."""
        import onnxruntime  # noqa: F401

    def try_program(self, artifact: Artifact) -> None:
        """Check its configuration and its graph; ONNX Runtime refuses damaged ones."""
        check_graph(_graph_of(artifact))

    def open(
        self, artifact: Artifact, threads: int, composition: str | None, runner: str
    ) -> Runner:
        """A composition is an ``.onnx_adapter`` file."""
        adapter = self._adapter(artifact, composition)
        if runner == GENAI:
            from caliport.validation.runners.genai import GenaiRunner

            return GenaiRunner(artifact.directory, threads, adapter=adapter)
        return OnnxRunner(artifact.directory, threads, adapter=adapter)

    def open_float(self, artifact: Artifact, threads: int) -> Runner:
        """``MatMulNBits`` at accuracy level 0."""
        return OnnxRunner(artifact.directory, threads, float_activations=True)

    def selector(self, artifact: Artifact, composition: str | None) -> str | None:
        """The name of the ``.onnx_adapter`` file."""
        return None if composition is None else str(artifact.composition(composition)["file"])

    def generate(
        self, artifact: Artifact, text: str, max_new_tokens: int, composition: str | None
    ) -> str:
        """By onnxruntime-genai."""
        adapter = self._adapter(artifact, composition)
        return generate(artifact.directory, text, max_new_tokens, adapter)

    def gap(self, composition: str | None) -> str | None:
        """It runs bundles too."""
        return None

    def ends(self, artifact: Artifact) -> list[int]:
        """``eos_token_id`` of ``genai_config.json``."""
        model = read_config(artifact.directory)["model"]
        return ends_of(model, artifact.directory / GENAI_CONFIG)

    def differing_settings(
        self, artifact: Artifact, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> list[str]:
        """``genai_config.json`` against what the exporter writes for the base."""
        from caliport.export.onnx.lower import genai_config

        expected = _fields(genai_config(model, artifact.context or 0, tokenizer))
        found = _fields(read_config(artifact.directory))
        return [
            name
            for name in sorted(expected.keys() | found.keys())
            if expected.get(name) != found.get(name)
            and "session_options" not in name
            and not name.endswith("eos_token_id")
        ]

    def integers(
        self, artifact: Artifact, shapes: Mapping[str, tuple[int, int]]
    ) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """See ``Engine.integers``."""
        from caliport.validation.runners.graph import integers

        return integers(_graph_of(artifact), shapes)

    def differing_weights(
        self, artifact: Artifact, decoder: ShippedDecoder, ranks: Mapping[str, int]
    ) -> Differing:
        """By the names of modules in the graph."""
        from caliport.validation.runners.graph import differing_weights

        return differing_weights(_graph_of(artifact), decoder)

    def _adapter(self, artifact: Artifact, composition: str | None) -> Path | None:
        file = self.selector(artifact, composition)
        return None if file is None else artifact.directory / file


ENGINE: Engine = OnnxEngine()
