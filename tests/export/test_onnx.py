"""The ONNX artifact gives eager PyTorch's logits and tokens, and holds exactly our integers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from caliport.core.checkpoints import eos_ids, load_base, load_tokenizer, render_prompt
from caliport.core.directories import read_manifest
from caliport.core.errors import InputError
from caliport.export.onnx import lower as lowering
from caliport.export.onnx.graph.layouts import unpack
from caliport.export.quantization.choices import PRECISIONS
from caliport.export.quantization.tensors import dequantize, quantized_weight
from caliport.export.reference.activations import in_blocks, quantize_blocks
from caliport.export.reference.folded import eager
from caliport.validation.runners.eager import EagerRunner
from caliport.validation.runners.onnx import OnnxRunner, generate, generate_ids
from caliport.validation.runners.runner import greedy
from tests.exports import to_onnx
from tests.lowerings import lowered_anew

CONTEXT = 96
BITS = {"int8": 8, "int4": 4}


@dataclass
class Artifact:
    """An exported directory, what it came from and what ``lower`` said."""

    precision: str
    directory: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: dict


@pytest.fixture(scope="module")
def artifact_of(
    base_dir: Path, adapter_dirs: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Artifact]:
    """Each precision once."""
    made: dict[str, Artifact] = {}
    root = tmp_path_factory.mktemp("onnx")

    def artifact(precision: str) -> Artifact:
        if precision not in made:
            adapter, out = adapter_dirs[0], root / precision
            to_onnx(base_dir, out, adapter=adapter, precision=precision, context=CONTEXT)
            model = eager(base_dir, adapter, precision)
            facts = read_manifest(out)["lowering"]
            made[precision] = Artifact(precision, out, model, load_tokenizer(base_dir), facts)
        return made[precision]

    return artifact


@pytest.fixture(params=PRECISIONS)
def artifact(request: pytest.FixtureRequest, artifact_of: Callable[[str], Artifact]) -> Artifact:
    return artifact_of(request.param)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    draw = np.random.default_rng(1)
    return [int(token) for token in draw.integers(5, 300, CONTEXT)]


def eager_logits(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """Logits after every token, without a cache: [n, vocab]."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


def in_chunks(runner: OnnxRunner, tokens: list[int], size: int) -> dict[int, np.ndarray]:
    """Logits by number of tokens read."""
    runner.reset()
    rows = {}
    for start in range(0, len(tokens), size):
        chunk = tokens[start : start + size]
        rows[start + len(chunk)] = runner.extend(chunk)
    return rows


@pytest.mark.parametrize("size", [1, 7, 40, CONTEXT])
def test_graph_equals_eager_at_any_split_up_to_the_last_position(
    artifact: Artifact, tokens: list[int], size: int
) -> None:
    """Without the rounding of activations nothing but float32's own order of sums is left."""
    expected = eager_logits(dequantize(artifact.model), tokens)
    runner = OnnxRunner(artifact.directory, threads=1, float_activations=True)
    found = in_chunks(runner, tokens, size)
    assert max(found) == CONTEXT
    for end, row in found.items():
        np.testing.assert_allclose(row, expected[end - 1], atol=1e-4, rtol=0)


def test_caches_are_forgotten(artifact: Artifact, tokens: list[int]) -> None:
    runner = OnnxRunner(artifact.directory, threads=1)
    first = runner.prefill(tokens[:20])
    runner.step(7)
    np.testing.assert_array_equal(runner.prefill(tokens[:20]), first)
    runner.reset()
    for token in tokens[:20]:
        last = runner.step(token)
    np.testing.assert_array_equal(runner.prefill(tokens[:20]), first)
    assert last.shape == first.shape == (artifact.model.config.vocab_size,)


def test_shipped_graph_is_near_its_reference(artifact: Artifact, tokens: list[int]) -> None:
    """With 8-bit activations two exact implementations still part, by far less than logits spread.

    A difference of 1e-7 in a sum lets one rounding fall the other way, and that one step lets
    others fall: eager against itself with embeddings changed by 1e-6 differs as much.
    """
    expected = eager_logits(in_blocks(artifact.model, artifact.precision), tokens)
    found = in_chunks(OnnxRunner(artifact.directory, threads=1), tokens, 1)
    rows = np.stack([found[end] for end in range(1, CONTEXT + 1)])
    error = np.sqrt(((rows - expected) ** 2).mean()) / expected.std()
    assert error < {"fp32": 1e-5, "int8": 0.05, "int4": 0.05}[artifact.precision]


@pytest.mark.parametrize("precision", BITS)
def test_every_product_rounds_its_input_as_the_reference_says(
    artifact_of: Callable[[str], Artifact], tokens: list[int], precision: str
) -> None:
    """Given the same input, every shipped product and eager's agree; ties are all that is left."""
    artifact = artifact_of(precision)
    plain = dequantize(artifact.model)
    graph = onnx.load(artifact.directory / "model.onnx")
    products = [node for node in graph.graph.node if node.op_type == "MatMulNBits"]
    names = sorted({name for node in products for name in (node.input[0], node.output[0])})
    present = {value.name for value in graph.graph.output}
    graph.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in names
        if name not in present
    )
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    feeds = {
        "input_ids": np.array([tokens]),
        "attention_mask": np.ones((1, CONTEXT), np.int64),
        "position_ids": np.arange(CONTEXT)[None],
    }
    for value in session.get_inputs()[3:]:
        feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    values = dict(zip(names, session.run(names, feeds), strict=True))
    assert sum(node.name.count("+") + 1 for node in products) == linears(artifact.model)
    for node in products:
        block = next(a.i for a in node.attribute if a.name == "block_size")
        rounded = quantize_blocks(torch.from_numpy(values[node.input[0]]), block)
        weights = [plain.get_submodule(name).weight for name in node.name.split("+")]
        with torch.no_grad():
            expected = (rounded @ torch.cat(weights).T).numpy()
        difference = np.abs(values[node.output[0]] - expected) / np.abs(expected).max()
        assert np.median(difference) < 1e-6, node.name
        assert difference.max() < 0.02, node.name


def linears(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Linear) for module in model.modules())


SMALL = {
    "vocab_size": 384,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
}
FAMILIES = {
    "biases and grouped heads": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, num_key_value_heads=2, intermediate_size=96)
    ),
    "scaled logits and attention": lambda: GraniteForCausalLM(
        GraniteConfig(**SMALL, intermediate_size=96, attention_multiplier=0.3, logits_scaling=2.0)
    ),
    "learned positions, products with bias": lambda: OPTForCausalLM(
        OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=64)
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_architectures(
    base_dir: Path, tmp_path: Path, tokens: list[int], family: str
) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    base = tmp_path / "base"
    model.save_pretrained(base)
    load_tokenizer(base_dir).save_pretrained(base)
    out = to_onnx(base, tmp_path / "out", precision="int4", context=64)
    expected = eager_logits(dequantize(eager(base, None, "int4")), tokens[:64])
    runner = OnnxRunner(out, threads=1, float_activations=True)
    for size in (1, 64):
        for end, row in in_chunks(runner, tokens[:64], size).items():
            np.testing.assert_allclose(row, expected[end - 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("precision", BITS)
def test_graph_holds_exactly_our_integers(
    artifact_of: Callable[[str], Artifact], precision: str
) -> None:
    artifact = artifact_of(precision)
    graph = onnx_ir.load(artifact.directory / "model.onnx").graph
    seen = []
    for node in graph:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            assert node.op_type not in ("MatMul", "FusedMatMul", "Gemm"), node.name
            continue
        modules = [artifact.model.get_submodule(name) for name in node.name.split("+")]
        seen += node.name.split("+")
        data, scale = (
            torch.cat(parts).numpy()
            for parts in zip(*(quantized_weight(module) for module in modules), strict=True)
        )
        places = (1, 2) if node.op_type == "MatMulNBits" else (0, 2)
        packed, scales = (node.inputs[i].const_value.numpy() for i in places)
        assert node.attributes["bits"].as_int() == BITS[precision]
        np.testing.assert_array_equal(unpack(packed, BITS[precision], data.shape[1]), data)
        np.testing.assert_array_equal(scales, np.broadcast_to(scale, scales.shape))
    layers = (nn.Linear, nn.Embedding)
    assert sorted(seen) == sorted(
        name for name, module in artifact.model.named_modules() if isinstance(module, layers)
    )
    assert artifact.facts["linears_quantized"] == linears(artifact.model)
    assert artifact.facts["embeddings_quantized"] == 1


def test_stock_generator_writes_eager_tokens(
    artifact: Artifact, prompts: list[list[int]], tokens: list[int]
) -> None:
    """onnxruntime_genai against our runner in every precision, and against eager in fp32.

    The last prompt leaves room for six tokens: its answer ends at the last position.
    """
    ends = eos_ids(artifact.model)
    runner = OnnxRunner(artifact.directory, threads=1)
    for prompt in [*prompts, tokens[: CONTEXT - 6]]:
        found = generate_ids(artifact.directory, prompt, 12)
        expected = [token for token in greedy(runner, prompt, 12, ends) if token not in ends]
        assert found == expected
        if artifact.precision == "fp32":
            eager = greedy(EagerRunner(artifact.model, "eager"), prompt, len(found), ends)
            assert found == [token for token in eager if token not in ends]


def test_stock_generator_reads_and_writes_text(artifact_of: Callable[[str], Artifact]) -> None:
    """The stock text ends at the first byte that is not UTF-8; random weights write such bytes."""
    artifact = artifact_of("fp32")
    readable = []
    for user in (
        "Anna trifft Tom, wörtlich:  ñandú 😀 don't\n",
        "Friday",
        "tennis park",
        "el parque",
    ):
        text = render_prompt(artifact.tokenizer, user)
        ids = artifact.tokenizer.encode(text, add_special_tokens=False)
        written = generate_ids(artifact.directory, ids, 10)
        expected = artifact.tokenizer.decode(written, skip_special_tokens=True)
        found = generate(artifact.directory, text, 10)
        readable.append(found.partition("\ufffd")[0])
        assert readable[-1] == expected.partition("\ufffd")[0]
    assert any(readable)


def test_saved_tokenizer_is_the_same_to_transformers(
    artifact_of: Callable[[str], Artifact],
) -> None:
    artifact = artifact_of("fp32")
    again = load_tokenizer_beside(artifact.directory)
    text = "Anna trifft Tom, wörtlich:  ñandú 😀 don't\n"
    assert again.encode(text) == artifact.tokenizer.encode(text)
    assert again.chat_template == artifact.tokenizer.chat_template


def load_tokenizer_beside(directory: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


def test_the_stock_runner_uses_the_threads_that_are_written(
    artifact_of: Callable[[str], Artifact],
) -> None:
    """Workers of a process that has nothing else; ONNX Runtime's own choice differs by machine."""
    directory = artifact_of("fp32").directory
    count = (
        "import os, sys, onnxruntime_genai as genai\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "config = genai.Config(sys.argv[1])\n"
        "if sys.argv[2:]: config.overlay(sys.argv[2])\n"
        "model = genai.Model(config)\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    other = {"model": {"decoder": {"session_options": {"intra_op_num_threads": 6}}}}
    extra = [
        int(subprocess.check_output([sys.executable, "-c", count, directory, *given]))
        for given in ([], [json.dumps(other)])
    ]
    assert extra[1] - extra[0] == 6 - lowering.THREADS


def test_tied_weights_are_stored_once(artifact: Artifact, base_dir: Path) -> None:
    graph = onnx_ir.load(artifact.directory / "model.onnx").graph
    places = {
        name.rpartition(".")[0]: (content.offset, content.length)
        for name, value in graph.initializers.items()
        if isinstance(content := value.const_value, onnx_ir.ExternalTensor)
        and name.endswith((".weight", ".qdata"))
    }
    assert places["model.embed_tokens"] == places["lm_head"]
    bits = {"fp32": 32, "int8": 8, "int4": 4}[artifact.precision]
    parameters = sum(p.numel() for p in load_base(base_dir).parameters())
    size = (artifact.directory / "model.onnx.data").stat().st_size
    scales = 4 * parameters / 32 if bits < 32 else 0
    alignment = 4096 * len(graph.initializers)
    assert size < parameters * bits / 8 + scales + alignment


def test_graph_names_no_file_of_the_machine_that_made_it(artifact: Artifact) -> None:
    graph = (artifact.directory / "model.onnx").read_bytes()
    assert str(Path.cwd()).encode() not in graph
    assert b".py" not in graph


def test_context_beyond_the_model_is_refused(base_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="context: found 129"):
        to_onnx(base_dir, tmp_path / "out", context=129)
    assert not list(tmp_path.iterdir())


def test_attention_turns_and_joins_by_itself(artifact_of: Callable[[str], Artifact]) -> None:
    """What onnxruntime-genai's builder writes for such a decoder, and one token after the last."""
    counts = artifact_of("int4").facts["operators"]
    layers = artifact_of("int4").model.config.num_hidden_layers
    assert counts["GroupQueryAttention"] == layers
    assert counts["MatMulNBits"] == 5 * layers + 1
    assert counts["SkipSimplifiedLayerNormalization"] == 2 * layers
    assert counts["Slice"] == 2
    assert not counts.keys() & {"Cos", "Transpose", "Reshape", "Concat", "Split"}


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "genai_config.json"])
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_broken_artifact_is_one_line(
    artifact_of: Callable[[str], Artifact], tmp_path: Path, name: str, harm: str
) -> None:
    broken = shutil.copytree(artifact_of("int4").directory, tmp_path / "broken")
    whole = (broken / name).read_bytes()
    (broken / name).unlink()
    if harm == "cut":
        (broken / name).write_bytes(whole[: len(whole) // 2])
    for load in (lambda: OnnxRunner(broken), lambda: generate_ids(broken, [5], 2)):
        with pytest.raises(InputError) as caught:
            load()
        assert "\n" not in str(caught.value)


def test_a_prompt_beyond_the_context_is_refused(
    artifact_of: Callable[[str], Artifact], tokens: list[int]
) -> None:
    artifact = artifact_of("fp32")
    runner = OnnxRunner(artifact.directory, threads=1)
    runner.prefill(tokens)
    with pytest.raises(InputError, match="context is 96"):
        runner.step(5)
    with pytest.raises(InputError, match="context is 96"):
        runner.prefill([*tokens, 5])
    with pytest.raises(InputError, match="a prompt of 96 tokens"):
        generate_ids(artifact.directory, tokens, 4)


def test_decoders_of_one_shape_are_traced_once_and_get_the_same_bytes(
    base_dir: Path,
    adapter_dirs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The third differs in its weights alone, and the fourth in its context."""
    traced = []
    plain = lowering.trace

    def counted(*args: Any) -> onnx_ir.Model:
        traced.append(args)
        return plain(*args)

    monkeypatch.setattr(lowering, "trace", counted)

    def files(name: str, adapter: int, context: int = CONTEXT) -> list[bytes]:
        out = tmp_path / name
        to_onnx(base_dir, out, adapter=adapter_dirs[adapter], precision="int4", context=context)
        return [(out / f"model.onnx{end}").read_bytes() for end in ("", ".data")]

    first, again, third = files("first", 0), files("again", 0), files("third", 1)
    assert len(traced) == 1
    files("fourth", 0, 64)
    assert len(traced) == 2
    assert first == again
    assert first[0] == third[0]
    assert first[1] != third[1]
    with lowered_anew():
        assert third == files("anew", 1)
