"""Every family gives eager PyTorch's logits on both runtimes.

The reference never has a cache: it reads all tokens at once with transformers' eager attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  registers torch.ops.llama
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from caliport.export.decoder.checks import check_exportable
from caliport.export.executorch.decoder import Decoder
from caliport.export.reference.folded import reference
from caliport.export.runtime import names
from caliport.validation.runners.executorch import ExecuTorchRunner
from caliport.validation.runners.onnx import OnnxRunner, generate_ids
from caliport.validation.runners.runner import greedy
from tests.export.families import CONTEXT, FAMILIES, WINDOW, build, save
from tests.exports import to_executorch, to_onnx
from tests.sampling import thorough

# Largest distance as a share of the largest logit; an order of sums away from eager.
TOLERANCE = 1e-5
# With activations rounded to 8 bits, eager parts from itself by as much when a weight moves by
# 1e-6: root mean square distance as a share of the logits' standard deviation.
LOOSE = 0.1

# How the tokens are cut into passes; each reads up to the last position.
SPLITS = ([CONTEXT], [1] * CONTEXT, [12, 33, 1, 17, 1])

# What ExecuTorch lowers in every run: windows and caps, the plain case, one product for three, and
# a partial rotation. In every run all families are traced, and all run in ONNX Runtime.
LOWERED = ("gemma2", "gemma3", "llama", "phi3", "stablelm2")
# Quantization has nothing to do with what sets these apart from a family that is quantized: gemma2
# from gemma3, smollm3 from llama, and so on. All are checked in float.
UNQUANTIZED = ("gemma2", "llama-dynamic", "phi3-longrope", "qwen2-sliding", "qwen3-yarn", "smollm3")
FLOAT = [
    thorough(family, runtime, left_out=runtime == "executorch" and family not in LOWERED)
    for family in FAMILIES
    for runtime in names()
]
QUANTIZED = [(name, "int4", "onnx") for name in FAMILIES if name not in UNQUANTIZED]
# ExecuTorch's linear layers are alike in all; these differ in what is around them: norms and a
# scaled lookup, one product for three, and biases.
QUANTIZED += [("gemma3", "int4", "executorch")]
QUANTIZED += [thorough(name, "int4", "executorch") for name in ("phi3", "qwen2")]
# 8 bits go the same way through a graph, so one stands for all.
QUANTIZED += [("llama", "int8", runtime) for runtime in names()]

Artifacts = Callable[[str, str, str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def artifacts(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Checkpoint and artifact of a family, runtime and precision, each made once."""
    root = tmp_path_factory.mktemp("architectures")

    def make(family: str, runtime: str, precision: str) -> tuple[Path, Path]:
        checkpoint, out = root / family, root / f"{family}-{runtime}-{precision}"
        if not checkpoint.exists():
            save(family, base_dir, checkpoint)
        if not out.exists():
            export = to_executorch if runtime == "executorch" else to_onnx
            export(checkpoint, out, precision=precision, context=CONTEXT)
        return checkpoint, out

    return make


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return np.random.default_rng(3).integers(5, 300, CONTEXT).tolist()


def _eager(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """Logits after every token, [n, vocab], without a cache."""
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def _runner(runtime: str, directory: Path) -> ExecuTorchRunner | OnnxRunner:
    return (ExecuTorchRunner if runtime == "executorch" else OnnxRunner)(directory)


def _in_passes(
    extend: Callable[[list[int]], np.ndarray], tokens: list[int], split: list[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Number of tokens read and the logits after them, pass by pass."""
    end = 0
    for count in split:
        end += count
        yield end, extend(tokens[end - count : end])


class _Eagerly:
    """What is traced for ExecuTorch, run as it is."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.position = decoder, 0

    def extend(self, tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            logits = self.decoder(torch.tensor([tokens]), torch.tensor([self.position]))
        self.position += len(tokens)
        return logits[0, 0].numpy()


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_traced_decoder_gives_eagers_logits(family: str, tokens: list[int]) -> None:
    """In one pass, in steps and in chunks, without any lowering."""
    model = build(family)
    expected = _eager(model, tokens)
    check_exportable(model, CONTEXT)
    decoder = _Eagerly(Decoder(model, CONTEXT))
    for split in SPLITS:
        decoder.position = 0
        for end, row in _in_passes(decoder.extend, tokens, split):
            assert _error(row, expected[end - 1]) < TOLERANCE
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(("family", "runtime"), FLOAT)
def test_artifact_gives_eagers_logits(
    artifacts: Artifacts, tokens: list[int], family: str, runtime: str
) -> None:
    _, directory = artifacts(family, runtime, "fp32")
    expected = _eager(build(family), tokens)
    runner = _runner(runtime, directory)
    for split in SPLITS:
        runner.reset()
        for end, row in _in_passes(runner.extend, tokens, split):
            assert _error(row, expected[end - 1]) < TOLERANCE
    assert _error(runner.prefill(tokens[:20]), expected[19]) < TOLERANCE
    if isinstance(runner, OnnxRunner):  # where past and present are one buffer
        found = generate_ids(directory, tokens[: CONTEXT - 12], 12)
        assert found == [i for i in greedy(runner, tokens[: CONTEXT - 12], 12, [2]) if i != 2]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "precision", "runtime"), QUANTIZED)
def test_quantized_artifact_is_near_its_reference(
    artifacts: Artifacts, tokens: list[int], family: str, runtime: str, precision: str
) -> None:
    checkpoint, directory = artifacts(family, runtime, precision)
    expected = _eager(reference(checkpoint, None, precision, runtime), tokens)
    runner = _runner(runtime, directory)
    rows = np.stack([row for _, row in _in_passes(runner.extend, tokens, [1] * CONTEXT)])
    assert np.sqrt(((rows - expected) ** 2).mean()) / expected.std() < LOOSE
    last = runner.prefill(tokens)
    assert np.sqrt(((last - expected[-1]) ** 2).mean()) / expected.std() < 2 * LOOSE


def _wider_window(model: PreTrainedModel) -> None:
    model.config.sliding_window += 1


def _all_full(model: PreTrainedModel) -> None:
    model.config.layer_types = ["full_attention"] * model.config.num_hidden_layers


def _no_cap(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None


def _other_scale(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.05


def _rope_everywhere(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.use_rope = 1


def _long_factors(model: PreTrainedModel) -> None:
    model.config.original_max_position_embeddings = CONTEXT - 1
    model.config.rope_parameters["original_max_position_embeddings"] = CONTEXT - 1


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gemma2", _wider_window),
        ("gemma2", _no_cap),
        ("gemma2", _other_scale),
        ("gemma3", _wider_window),
        ("gemma3", _all_full),
        ("phi3", _wider_window),
        ("phi3-longrope", _long_factors),
        ("smollm3", _rope_everywhere),
    ],
)
def test_a_slightly_other_model_would_be_noticed(
    tokens: list[int], family: str, change: Callable[[PreTrainedModel], None]
) -> None:
    expected = _eager(build(family), tokens)
    model = build(family)
    change(model)
    assert _error(_eager(model, tokens), expected) > 100 * TOLERANCE


def test_rotary_embeddings_of_short_texts_are_traced_and_the_model_is_left_as_it_was(
    tokens: list[int],
) -> None:
    """A text beyond the first context leaves the long frequencies in the module."""
    model = build("phi3-longrope")
    short, long = _eager(model, tokens), _eager(model, tokens * 2)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad():
        found = Decoder(model, CONTEXT)(torch.tensor([tokens]), torch.tensor([0]))
    assert _error(found[0, 0].numpy(), short[-1]) < TOLERANCE
    assert model.model.rotary_emb.rope_type == "longrope"
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, frequencies)
    np.testing.assert_array_equal(_eager(model, tokens * 2), long)


class _Masks(TorchDispatchMode):
    """Notes for every call of the kernel whether it was given a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.llama.custom_sdpa.default:
            self.given.append(args[4] is not None)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("family", "context", "given"),
    [
        ("gemma3", CONTEXT, [True, True, False, True]),
        ("gemma3", WINDOW, [False] * 4),
        ("llama", CONTEXT, [False] * 2),
    ],
)
def test_masks_are_made_only_where_the_kernel_cannot_mask(
    family: str, context: int, given: list[bool]
) -> None:
    with torch.no_grad(), _Masks() as masks:
        Decoder(build(family), context)(torch.tensor([[5, 6]]), torch.tensor([0]))
    assert masks.given == given


def test_the_kernel_leaves_out_whole_blocks_of_masked_keys() -> None:
    """It goes through the keys in blocks of 512, of which a narrow window sees none in most."""
    torch.manual_seed(0)
    context, window = 1300, 16
    keys, values = torch.randn(2, 1, context, 2, 16).unbind(0)
    for start, count in ((1200, 1), (1000, 300), (0, context)):
        query = torch.randn(1, count, 4, 16) * 3
        distance = torch.arange(count)[:, None] + start - torch.arange(context)
        seen = (distance >= 0) & (distance < window)
        mask = torch.where(seen, 0.0, -1e9)
        found = torch.ops.llama.custom_sdpa(query, keys, values, start, mask, 0.0, False, 0.25)
        wide = [states.transpose(1, 2).repeat_interleave(2, 1) for states in (keys, values)]
        expected = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2), *wide, attn_mask=seen, scale=0.25
        )
        torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-4, rtol=0)
