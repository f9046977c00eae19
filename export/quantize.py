"""Quantize a decoder's weights; the same integers ship to every runtime.

Every quantized weight is symmetric: w ≈ q · scale, with no zero point. Linear layers also quantize
their inputs while they run: 8 bits, asymmetric, one scale and zero point per token.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from caliport_core.errors import InputError
from export.artifact import PRECISIONS
from export.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP_SIZE = 32
_SMALL = 1 << 21

_INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # not in torch 2.13's stubs
_BITS = {"int8": torch.int8, "int4": _INT4}
_PER_TOKEN = "int8_asym_per_token"
_ACTIVATIONS = {"bits": 8, "kind": "dynamic", "granularity": "token", "symmetric": False}
_EMBEDDING = {
    "bits": 8,
    "granularity": "row",
    "algorithm": "max-abs",
    "symmetric": True,
    "scale": "float32",
}
_SCHEMES: dict[str, dict[str, Any]] = {
    "fp32": {"linear": {"bits": 32}, "activations": {"bits": 32}, "embedding": {"bits": 32}},
    "int8": {
        "linear": {
            "bits": 8,
            "granularity": "output channel",
            "algorithm": "max-abs",
            "symmetric": True,
            "scale": "float32",
        },
        "activations": _ACTIVATIONS,
        "embedding": _EMBEDDING,
    },
    "int4": {
        "linear": {
            "bits": 4,
            "granularity": "group",
            "group_size": GROUP_SIZE,
            "algorithm": "hqq_scale_only",
            "symmetric": True,
            "scale": "bfloat16",
        },
        "activations": _ACTIVATIONS,
        "embedding": _EMBEDDING,
    },
}


def scheme(precision: str) -> dict[str, Any]:
    """What ``precision`` means, for a manifest: bits, granularity, algorithm of each part.

    ``scale`` is the type whose values the scales take (they are held as float32 here).

    Raises:
        InputError: Not one of ``PRECISIONS``.
    """
    _check_precision(precision)
    return copy.deepcopy(_SCHEMES[precision])


def quantize(model: PreTrainedModel, precision: str) -> PreTrainedModel:
    """Quantize every linear layer (the head included) and every embedding, in place.

    - ``fp32``: nothing is done; tied weights stay tied.
    - ``int8``: linear weights in 8 bits, one scale per output channel.
    - ``int4``: linear weights in 4 bits, one scale per group of 32 inputs, scales fitted by
      half-quadratic quantization (https://mobiusml.github.io/hqq_blog) and rounded to bfloat16.
    - ``int8`` and ``int4``: embeddings in 8 bits, one scale per row; a tied head is untied first.
      One scale per row and not per group: at 8 bits it costs little accuracy and saves an eighth.

    The weights become torchao tensors, which eager PyTorch runs in float arithmetic on the
    quantized values and ``torch.export`` lowers. Read them with ``quantized_weight``.

    Args:
        model: A float32 decoder.
        precision: One of ``PRECISIONS``.

    Returns:
        ``model``.

    Raises:
        InputError: Unknown precision, a weight matrix outside linear layers and embeddings, or
            (int4) a layer whose inputs do not divide into groups of 32. Nothing is changed then.
    """
    _check_precision(precision)
    if precision == "fp32":
        return model
    _check_layers(model, precision)
    _untie(model)
    bits = _BITS[precision]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                _replace(module, _linear_weight(module.weight.detach(), bits))
            elif isinstance(module, nn.Embedding):
                _replace(module, _rows(module.weight.detach(), activations=None))
                # Only gradients know of it. ExecuTorch 1.5.1 fuses a quantized embedding into one
                # operator only without it, and has no kernel for the unfused form.
                module.padding_idx = None
    return model


def quantized_weight(module: nn.Linear | nn.Embedding) -> tuple[Tensor, Tensor]:
    """The integers and scales of a quantized layer: weight = q · scale.

    Args:
        module: A linear layer or an embedding that ``quantize`` has changed.

    Returns:
        q int8 [out, in] (an embedding: [rows, dim]; 4-bit values lie in [-8, 7]) and scale
        float32 [out, groups], where group g covers the in / groups inputs from g · in / groups.

    Raises:
        TypeError: The layer is not quantized.
    """
    weight = module.weight
    if not is_quantized(module):
        raise TypeError(f"{type(module).__name__} holds a plain {weight.dtype} weight")
    return _parts(weight)


def _parts(weight: Any) -> tuple[Tensor, Tensor]:
    assert not weight.zero_point.any(), "every scheme here is symmetric"
    return weight.qdata, weight.scale.float()


def is_quantized(module: nn.Module) -> bool:
    """Whether ``quantize`` has changed this layer's weight."""
    return hasattr(getattr(module, "weight", None), "qdata")


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with plain float32 weights that hold exactly q · scale, and no other quantization.

    Activations are not quantized, so its distance to the quantized model is the activations'
    share of the error, and its distance to the float32 model the weights' share.
    """
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and is_quantized(module):
            _replace(module, _values(*quantized_weight(module)))
    return plain


def _values(data: Tensor, scale: Tensor) -> Tensor:
    return (data.float().unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)


def rounded(weight: Tensor, precision: str) -> Tensor:
    """The float32 values q · scale that ship for one linear weight [out, in].

    Exactly what ``quantize`` and ``dequantize`` give for it; for training through them.
    """
    if precision == "fp32":
        return weight
    return _values(*_parts(_linear_weight(weight, _BITS[precision])))


def as_shipped(model: PreTrainedModel, precision: str, keep: Iterable[str] = ()) -> PreTrainedModel:
    """A plain float32 copy of a model that holds the values that ship in ``precision``.

    Args:
        model: A float32 decoder; stays as it is.
        precision: One of ``PRECISIONS``.
        keep: Linear layers whose own weights are kept, since they are rounded later together
            with an update (``rounded``).
    """
    plain = dequantize(quantize(copy.deepcopy(model), precision))
    for name in keep:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        _replace(plain.get_submodule(name), weight.detach().clone())
    return plain


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise InputError(f"precision: found {precision!r}, expected one of {', '.join(PRECISIONS)}")


def _check_layers(model: PreTrainedModel, precision: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if precision == "int4" and module.in_features % GROUP_SIZE:
                raise InputError(
                    f"{name}: {module.in_features} inputs cannot be cut into int4 groups; "
                    f"expected a multiple of {GROUP_SIZE}, or precision int8"
                )
        elif not isinstance(module, nn.Embedding):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1:
                    raise InputError(
                        f"{name}.{key}: a weight matrix in a {type(module).__name__} cannot be "
                        "quantized; expected linear layers and embeddings only, or precision fp32"
                    )


def _untie(model: PreTrainedModel) -> None:
    """Give a tied head a weight of its own: head and embedding are quantized differently."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def _replace(module: nn.Module, weight: Tensor) -> None:
    module.weight = nn.Parameter(weight, requires_grad=False)


def _linear_weight(weight: Tensor, bits: torch.dtype) -> Tensor:
    return _rows(weight, _PER_TOKEN) if bits == torch.int8 else _groups(weight)


def _rows(weight: Tensor, activations: str | None) -> Tensor:
    return _tensor_type().from_hp(
        weight, (1, weight.shape[1]), torch.int8, activation_quantization=activations
    )


def _groups(weight: Tensor) -> Tensor:
    """4-bit groups whose scales are bfloat16 values.

    ExecuTorch 1.5.1 stores XNNPACK's group scales as bfloat16 whatever type they come in. Rounding
    them here, before the integers are taken, makes eager and artifact the same numbers.
    """
    block = (1, GROUP_SIZE)
    with _threads_that_pay(weight):
        fitted = _tensor_type().from_hp(
            weight, block, _INT4, intx_choose_qparams_algorithm="hqq_scale_only"
        )
    return _tensor_type().from_hp(
        weight,
        block,
        _INT4,
        activation_quantization=_PER_TOKEN,
        intx_choose_qparams_algorithm=None,
        custom_scale=fitted.scale.bfloat16().float(),
        custom_zero_point=fitted.zero_point,
    )


@contextmanager
def _threads_that_pay(weight: Tensor) -> Iterator[None]:
    """One thread for a small weight.

    The fit is some two hundred short operations; on busy cores their threads wait for each other
    up to fifty times longer than they work.
    """
    before = torch.get_num_threads()
    if weight.numel() < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tensor_type() -> Any:
    with quiet():
        from torchao.quantization import IntxUnpackedToInt8Tensor
    return IntxUnpackedToInt8Tensor
