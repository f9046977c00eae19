"""An int8 key-value cache: what ExecuTorch computes is what eager PyTorch rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  registers torch.ops.llama
import numpy as np
import pytest
import torch
from conftest import random_adapter
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from caliport.core.directories import read_manifest
from caliport.core.errors import InputError
from caliport.export.executorch.decoder import Decoder
from caliport.export.make import fill, make
from caliport.export.quantization.cache import SCHEME, rounded
from caliport.export.quantization.choices import Quantization
from caliport.export.reference.beside import reference as bundle_reference
from caliport.export.reference.folded import reference
from caliport.export.reference.int8_cache import round_cache
from caliport.export.request import Bundle, Request
from caliport.validation.runners.executorch import ExecuTorchRunner
from tests.export.families import FAMILIES, build, save
from tests.exports import to_executorch
from tests.sampling import thorough

CONTEXT = 64
# How the tokens are cut into passes; each reads up to the last position.
SPLITS = ([CONTEXT], [1] * CONTEXT, [12, 33, 1, 17, 1])
# Largest distance from eager as a share of the largest logit, by order of sums alone. Where such a
# difference lies on the edge between two of 255 steps, a value takes another step and stays in the
# cache: so the best way of cutting is held to this, and every way to a part of what rounding costs.
SUMS = 1e-4
# With activations in 8 bits, an edge moves as much as in any int4 artifact (test_executorch).
LOOSE = 6e-2


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return np.random.default_rng(3).integers(5, 300, CONTEXT).tolist()


def _eager(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """Logits after every token, [n, vocab]."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _errors(
    extend: Callable[[list[int]], np.ndarray],
    tokens: list[int],
    split: list[int],
    expected: np.ndarray,
) -> list[float]:
    """The distance from eager after each pass."""
    ends = np.cumsum(split)
    return [
        _error(extend(tokens[end - count : end]), expected[end - 1])
        for end, count in zip(ends, split, strict=True)
    ]


def test_values_are_rounded_to_the_nearest_of_255_steps() -> None:
    values = torch.randn(3, 5, 2, 16, generator=torch.Generator().manual_seed(0))
    values[0, 0] = 0.0
    data, scale, zero = rounded(values)
    assert (data.dtype, scale.shape, zero.shape) == (torch.int8, (3, 5, 2, 1), (3, 5, 2, 1))
    found = (data.float() - zero.float()) * scale
    span = values.amax(-1, keepdim=True).clamp_min(0) - values.amin(-1, keepdim=True).clamp_max(0)
    assert bool(((found - values).abs() <= span / 255).all())
    assert bool((found[0, 0] == 0).all())


class _Eagerly:
    """What is traced for ExecuTorch, run as it is."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.decoder, self.position = Decoder(model, CONTEXT, 8), 0

    def extend(self, tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            logits = self.decoder(torch.tensor([tokens]), torch.tensor([self.position]))
        self.position += len(tokens)
        return logits[0, 0].numpy()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma2"])
def test_the_traced_decoder_reads_its_cache_as_eager_does(family: str, tokens: list[int]) -> None:
    """Windows, grouped heads and all rotary forms, without any lowering."""
    expected = _eager(round_cache(build(family)), tokens)
    decoder = _Eagerly(build(family))
    found = []
    for split in SPLITS:
        decoder.position = 0
        found.append(_errors(decoder.extend, tokens, split, expected))
    cost = _error(expected, _eager(build(family), tokens))
    assert cost > 50 * SUMS
    assert min(np.median(errors) for errors in found) < SUMS
    assert max(max(errors) for errors in found) < 0.4 * cost


@pytest.mark.parametrize(
    ("family", "precision"),
    # Each kind of weights once; windows, norms of keys and one head of keys are with int4.
    [thorough("llama", "fp32"), ("gemma3", "int4")],
)
def test_the_artifact_gives_its_references_logits(
    family: str, precision: str, base_dir: Path, tmp_path: Path, tokens: list[int]
) -> None:
    base = save(family, base_dir, tmp_path / "base")
    out = tmp_path / "art"
    to_executorch(base, out, precision=precision, context=CONTEXT, cache_bits=8)
    manifest = read_manifest(out)
    assert manifest["scheme"]["cache"] == SCHEME
    how = Quantization.of(manifest)
    assert how == Quantization(precision, cache_bits=8)
    model = reference(base, None, how, "executorch")
    expected = _eager(model, tokens)
    runner = ExecuTorchRunner(out)
    for split in SPLITS:
        runner.reset()
        errors = _errors(runner.extend, tokens, split, expected)
        assert max(errors) < (SUMS if precision == "fp32" else LOOSE)
    assert _error(runner.prefill(tokens[:20]), expected[19]) < LOOSE
    # Alone in the context, nearly every token meets no edge: all roundings are the very same.
    alone = [[token] for token in range(5, 105)]
    errors = [_error(runner.prefill(one), _eager(model, one)[0]) for one in alone]
    assert (np.array(errors) < SUMS).mean() > 0.8


def test_the_loss_is_nearly_that_of_a_float_cache(base_dir: Path, tokens: list[int]) -> None:
    found = {}
    for bits in (None, 8):
        model = reference(base_dir, None, Quantization("fp32", cache_bits=bits), "executorch")
        logits = torch.from_numpy(_eager(model, tokens))
        found[bits] = float(cross_entropy(logits[:-1], torch.tensor(tokens[1:])))
    assert 0 < abs(found[8] - found[None]) < 2e-3 * found[None]


@pytest.mark.slow
def test_methods_of_a_bundle_have_an_int8_cache(
    base_dir: Path, tmp_path: Path, tokens: list[int]
) -> None:
    adapter = random_adapter(base_dir, tmp_path / "adapter", seed=1)
    how = Quantization("fp32", cache_bits=8)
    bundle = Bundle({"one": adapter})
    fill(tmp_path, {}, Request(base_dir, "executorch", how, CONTEXT, bundle=bundle))
    for method, folded in (("forward", None), ("one", adapter)):
        expected = _eager(bundle_reference(base_dir, folded, how, "executorch"), tokens)
        runner = ExecuTorchRunner(tmp_path, method=method)
        errors = _errors(runner.extend, tokens, [40, *[1] * 24], expected)
        assert max(errors) < SUMS


def test_what_has_no_int8_cache_is_refused_before_any_work(base_dir: Path, tmp_path: Path) -> None:
    base = save("gemma2", base_dir, tmp_path / "base")
    with pytest.raises(InputError, match=r"cache_bits: found 8, .* attn_logit_softcapping of 4\.0"):
        to_executorch(base, tmp_path / "out", cache_bits=8)
    with pytest.raises(InputError, match="cache_bits: found 8 with onnx, expected none"):
        make(Request(base_dir, "onnx", Quantization("int4", cache_bits=8)), tmp_path / "out")
    with pytest.raises(InputError, match="cache_bits: found 4, expected 8 or none"):
        to_executorch(base_dir, tmp_path / "out", cache_bits=4)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
