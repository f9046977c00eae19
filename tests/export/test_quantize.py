"""The quantized integers are in range and close, and the same numbers however they are read."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from caliport.core.checkpoints import load_base
from caliport.core.errors import InputError
from caliport.export.quantization.choices import GROUP_SIZE, PRECISIONS
from caliport.export.quantization.integers import integers
from caliport.export.quantization.tensors import (
    dequantize,
    is_quantized,
    plan,
    quantize,
    quantized_weight,
    scheme,
    unpacked,
)
from caliport.export.reference.activations import by_token

QUANTIZED = ("int8", "int4")


@pytest.fixture(scope="module")
def plain(base_dir: Path) -> PreTrainedModel:
    return load_base(base_dir)


@pytest.fixture(scope="module", params=QUANTIZED)
def case(request: pytest.FixtureRequest, plain: PreTrainedModel) -> tuple[str, PreTrainedModel]:
    return request.param, quantize(copy.deepcopy(plain), request.param)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Linear, nn.Embedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _dense(module: nn.Module) -> torch.Tensor:
    data, scale = quantized_weight(module)
    return data.float() * scale.repeat_interleave(data.shape[1] // scale.shape[1], dim=1)


def test_every_linear_and_embedding_is_quantized(case: tuple[str, PreTrainedModel]) -> None:
    precision, model = case
    bits = scheme(precision)["linear"]["bits"]
    layers = _layers(model)
    assert {"lm_head", "model.embed_tokens"} < set(layers)
    for name, module in layers.items():
        assert is_quantized(module), name
        data, scale = quantized_weight(module)
        low, high = int(data.min()), int(data.max())
        half = 2 ** (bits - 1)  # the embedding too, since it is tied to the head
        groups = data.shape[1] // GROUP_SIZE if precision == "int4" else 1
        assert data.dtype == torch.int8
        assert scale.dtype == torch.float32
        assert scale.shape == (data.shape[0], groups)
        assert -half <= low < -half / 2 < half / 2 < high < half


def test_each_weight_is_within_half_a_step_of_its_integer(
    case: tuple[str, PreTrainedModel], plain: PreTrainedModel
) -> None:
    """|w - q·scale| <= scale / 2, but for the 4-bit weights that a fitted scale clips."""
    precision, model = case
    for name, module in _layers(model).items():
        data, scale = quantized_weight(module)
        step = scale.repeat_interleave(data.shape[1] // scale.shape[1], dim=1)
        error = (plain.get_submodule(name).weight - _dense(module)).abs() / step
        clipped = (data == -8) | (data == 7) if precision == "int4" else data == 127
        assert error[~clipped].max() <= 0.5 + 1e-4, name
        assert error.max() <= (2 if precision == "int4" else 0.5 + 1e-4), name


def test_int4_scales_survive_bfloat16_and_fit_better_than_the_largest_weight(
    plain: PreTrainedModel,
) -> None:
    """XNNPACK keeps group scales as bfloat16; and fitting them is why HQQ is used at all."""
    weight = plain.get_submodule("model.layers.0.mlp.up_proj").weight
    model = quantize(copy.deepcopy(plain), "int4")
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    _, scale = quantized_weight(layer)
    torch.testing.assert_close(scale, scale.bfloat16().float(), rtol=0, atol=0)

    groups = weight.detach().unflatten(1, (-1, GROUP_SIZE))
    step = groups.abs().amax(2, keepdim=True) / 7
    largest = (groups / step).round().clamp(-8, 7) * step
    assert (weight - _dense(layer)).square().mean() < (groups - largest).square().mean()


def test_dequantized_model_holds_torchaos_own_numbers(case: tuple[str, PreTrainedModel]) -> None:
    _, model = case
    copied = dequantize(model)
    for name, module in _layers(model).items():
        weight = copied.get_submodule(name).weight
        assert type(weight) is nn.Parameter
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, module.weight.dequantize(), rtol=0, atol=0)
        torch.testing.assert_close(weight, _dense(module), rtol=0, atol=0)
        assert is_quantized(module), "the model itself is left as it was"


def test_fp32_changes_nothing(plain: PreTrainedModel, prompts: list[list[int]]) -> None:
    model = quantize(copy.deepcopy(plain), "fp32")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.tensor([prompts[0]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)


def test_error_grows_as_bits_shrink(plain: PreTrainedModel, prompts: list[list[int]]) -> None:
    ids = torch.tensor([prompts[2]])
    with torch.no_grad():
        expected = plain(ids).logits
        errors = [
            ((quantize(copy.deepcopy(plain), p)(ids).logits - expected).norm() / expected.norm())
            for p in PRECISIONS
        ]
    assert errors[0] == 0 < errors[1] < errors[2]
    assert errors[1] < 0.1


def test_forms_follow_groups_ties_and_wishes(plain: PreTrainedModel) -> None:
    """What does not divide falls back to int8, a tied embedding has its head's integers."""
    model = copy.deepcopy(plain)
    down, up = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"
    model.model.layers[1].mlp.down_proj = nn.Linear(40, 64)
    forms = plan(model, "int4", [up])
    assert forms[down] == forms[up] == "int8"
    assert forms["lm_head"] == "int4"
    assert forms["model.embed_tokens"] == "rows int4"
    assert plan(model, "int4", ["lm_head"])["model.embed_tokens"] == "rows int8"
    assert plan(model, "int4", embedding_bits=8)["model.embed_tokens"] == "rows int8"
    assert set(plan(model, "int8").values()) == {"int8", "rows int8"}
    quantized = quantize(model, "int4", forms)
    head, table = (quantized.get_submodule(n) for n in ("lm_head", "model.embed_tokens"))
    for one, other in zip(quantized_weight(head), quantized_weight(table), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    for precision, bits in (("int8", 4), ("int4", 2)):
        with pytest.raises(InputError, match=f"embedding bits: found {bits} with {precision}"):
            plan(plain, precision, embedding_bits=bits)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_integers_are_torchaos(form: str) -> None:
    """Slice by slice and by our own fit, the integers and scales that torchao finds at once."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    torch.manual_seed(0)
    weight = torch.randn(96, 512) * 0.02
    weight[3] = 0
    weight[5, :GROUP_SIZE] = 0
    parts = list(integers(lambda start, stop: weight[start:stop], 96, 512, form))
    data, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    if form == "int8":
        expected = IntxUnpackedToInt8Tensor.from_hp(weight, (1, 512), torch.int8)
    else:
        block, data = (1, GROUP_SIZE), unpacked(data)
        fitted = IntxUnpackedToInt8Tensor.from_hp(
            weight, block, torch.int4, intx_choose_qparams_algorithm="hqq_scale_only"
        )
        expected = IntxUnpackedToInt8Tensor.from_hp(
            weight,
            block,
            torch.int4,
            intx_choose_qparams_algorithm=None,
            custom_scale=fitted.scale.bfloat16().float(),
            custom_zero_point=fitted.zero_point,
        )
    torch.testing.assert_close(data, expected.qdata, rtol=0, atol=0)
    torch.testing.assert_close(scale.float(), expected.scale, rtol=1e-6, atol=2e-7)


def test_weights_outside_linears_and_unknown_precisions_are_refused(plain: PreTrainedModel) -> None:
    model = copy.deepcopy(plain)
    model.model.extra = nn.Conv1d(4, 4, 3)
    with pytest.raises(InputError, match=r"^model\.extra\.weight: .*Conv1d"):
        quantize(model, "int8")
    with pytest.raises(InputError, match="'int2', expected one of fp32, int8, int4"):
        quantize(model, "int2")
    with pytest.raises(InputError, match="precision"):
        scheme("int2")
    with pytest.raises(TypeError, match="plain"):
        quantized_weight(plain.lm_head)


@pytest.mark.parametrize("lacks", ["home", "place"])
def test_compiled_code_is_kept_in_a_place_of_the_users_or_not_at_all(
    lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a home, numba would take ``./~``, which may be a stranger's."""
    from numba.core import caching

    from caliport.export.quantization.quantizers.compiled import compiled

    if lacks == "home":
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    else:
        monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    twice = compiled("float32(float32)")(lambda x: x + x)
    assert twice(2.0) == 4.0
    assert type(twice._cache).__name__ == "NullCache"


def test_float_weights_give_torchaos_logits_to_the_last_bit(
    case: tuple[str, PreTrainedModel],
) -> None:
    _, model = case
    tokens = torch.arange(5, 60).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(by_token(model)(tokens).logits, model(tokens).logits)
