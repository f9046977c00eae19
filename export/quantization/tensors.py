"""Quantize a decoder's weights; the same integers ship to every runtime.

Every quantized weight is symmetric: w ≈ q · scale, with no zero point. Linear layers also quantize
their inputs at run time to 8 bits: asymmetric with one scale and zero point per token, or symmetric
with one scale per block, as the runtime does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from caliport.core.errors import InputError
from caliport.core.patching import quiet
from caliport.export.quantization.choices import GROUP_SIZE, Form, Quantization, check_precision
from caliport.export.quantization.integers import integers
from caliport.export.quantization.quantizers.registry import DEFAULTS, QUANTIZERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from caliport.export.runtime import Rounding


class KnownIntegers(Protocol):
    """Integers and scales that were found before, by module name."""

    def __contains__(self, module: str, /) -> bool:
        """Whether those of a linear layer are known."""
        ...

    @property
    def replaced(self) -> Mapping[str, Tensor]:
        """Tuned parameters that ship in place of the model's, float32, by parameter name."""
        ...

    def parts(self, module: str) -> tuple[Tensor, Tensor]:
        """Packed integers, uint8 [out, in / 2], and scales, bfloat16 [out, in / 32].

        Raises:
            InputError: They cannot be read.
        """
        ...


_INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # not in torch 2.13's stubs
_PER_TOKEN = "int8_asym_per_token"
_ACTIVATIONS = {"bits": 8, "kind": "dynamic", "granularity": "token", "symmetric": False}
_EMBEDDING = {
    "bits": 8,
    "granularity": "row",
    "algorithm": None,
    "symmetric": True,
    "scale": "float32",
}
# Algorithms that are None here are filled in from the quantizers.
_SCHEMES: dict[str, dict[str, Any]] = {
    "fp32": {"linear": {"bits": 32}, "activations": {"bits": 32}, "embedding": {"bits": 32}},
    "int8": {
        "linear": {
            "bits": 8,
            "granularity": "output channel",
            "algorithm": None,
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
            "algorithm": None,
            "symmetric": True,
            "scale": "bfloat16",
        },
        "activations": _ACTIVATIONS,
        "embedding": _EMBEDDING,
    },
}


def scheme(
    precision: str, rounding: Rounding = "token", quantizer: str | None = None
) -> dict[str, Any]:
    """The scheme of ``precision``, for a manifest: bits, granularity, algorithm of each part.

    ``scale`` is the type that the scales are rounded to (in memory they are float32).

    Args:
        precision: One of ``PRECISIONS``.
        rounding: How the runtime rounds the inputs of quantized products.
        quantizer: Of the 4-bit linear layers; None for the default.

    Raises:
        InputError: Not one of ``PRECISIONS``.
    """
    check_precision(precision)
    found = copy.deepcopy(_SCHEMES[precision])
    for part in found.values():
        if "algorithm" in part:
            chosen = quantizer if quantizer is not None and part["bits"] == 4 else None
            part["algorithm"] = QUANTIZERS[chosen or DEFAULTS[part["bits"]]].algorithm
    if rounding == "block" and found["activations"]["bits"] == 8:
        found["activations"] |= {"granularity": "block", "symmetric": True}
    return found


def plan(
    model: nn.Module, precision: str, int8: Iterable[str] = (), embedding_bits: int | None = None
) -> dict[str, Form]:
    """How each linear layer (the head included) and each embedding ships, by module name.

    - ``fp32``: nothing is quantized.
    - ``int8``: linear weights in 8 bits, one scale per output channel.
    - ``int4``: linear weights in 4 bits, one scale per group of 32 inputs. A layer whose inputs do
      not divide into groups, or that is listed in ``int8``, has 8 bits as above.
    - Embeddings have 8 bits, one scale per row, or 4 bits in groups of 32. An embedding that is
      tied to the head uses the head's integers, so that both are stored once.

    Args:
        model: The decoder, on any device including ``meta``.
        precision: One of ``PRECISIONS``.
        int8: Linear layers to keep at 8 bits.
        embedding_bits: 4 or 8 with ``int4``. None for the bits of a tied head, or 8 if not tied.

    Raises:
        InputError: Unknown precision or layer, other bits, a weight matrix outside linear layers
            and embeddings.
    """
    check_precision(precision)
    if precision == "fp32":
        return {}
    kept = set(int8)
    _check_matrices(model)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if odd := sorted(kept - set(linears)):
        raise InputError(f"int8 layers: {odd[0]} is no linear layer of the model")
    forms: dict[str, Form] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            grouped = precision == "int4" and not module.in_features % GROUP_SIZE
            forms[name] = "int4" if grouped and name not in kept else "int8"
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            forms[name] = _embedding_form(name, module, linears, forms, embedding_bits, precision)
    return forms


def plan_of(model: nn.Module, how: Quantization) -> dict[str, Form]:
    """``plan`` with the choices of a ``Quantization``."""
    return plan(model, how.precision, how.int8_layers, how.embedding_bits)


def _embedding_form(
    name: str,
    module: nn.Embedding,
    linears: Mapping[str, nn.Linear],
    forms: Mapping[str, Form],
    bits: int | None,
    precision: str,
) -> Form:
    if bits not in (None, 8, 4) or (bits == 4 and precision != "int4"):
        raise InputError(f"embedding bits: found {bits} with {precision}, expected 8, or 4 in int4")
    head = next((n for n, m in linears.items() if m.weight is module.weight), None)
    if bits is None:
        bits = 4 if head is not None and forms[head] == "int4" else 8
    if bits == 4 and module.embedding_dim % GROUP_SIZE:
        raise InputError(f"{name}: {module.embedding_dim} values a row do not divide into groups")
    return "rows int4" if bits == 4 else "rows int8"


def quantize(
    model: PreTrainedModel,
    precision: str,
    forms: Mapping[str, Form] | None = None,
    known: KnownIntegers | None = None,
) -> PreTrainedModel:
    """Quantize every linear layer (the head included) and every embedding, in place.

    The weights become torchao tensors, which eager PyTorch runs in float arithmetic on the
    quantized values and ``torch.export`` lowers. Read them with ``quantized_weight``. For ``fp32``
    nothing is done; otherwise a tied head is untied, since it quantizes its inputs.

    Args:
        model: A float32 decoder.
        precision: One of ``PRECISIONS``.
        forms: How each layer ships; default ``plan(model, precision)``.
        known: Integers to take in place of quantizing; a tied embedding takes the head's.

    Returns:
        ``model``.

    Raises:
        InputError: See ``plan``. The model is then unchanged.
    """
    forms = plan(model, precision) if forms is None else forms
    if precision == "fp32":
        return model
    owners = known_owners(model, forms, known)
    _untie(model)
    with torch.no_grad():
        for name, form in forms.items():
            module = model.get_submodule(name)
            assert isinstance(module.weight, Tensor)
            if known is not None and name in owners:
                data, scale = known.parts(owners[name])
                _replace(module, torchao_tensor(unpacked(data), scale.float(), form))
            else:
                _replace(module, quantized(module.weight.detach(), form))
            if isinstance(module, nn.Embedding):
                module.padding_idx = None  # only used for gradients
        for name, value in known.replaced.items() if known is not None else ():
            model.get_parameter(name).copy_(value)
    return model


def known_owners(
    model: PreTrainedModel, forms: Mapping[str, Form], known: KnownIntegers | None
) -> dict[str, str]:
    """By module, the linear layer whose known integers it takes: itself, or a tied head."""
    if known is None:
        return {}
    found = {name: name for name, form in forms.items() if form == "int4" and name in known}
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is table.weight:
        names = {id(module): name for name, module in model.named_modules()}
        owner, tied = names[id(head)], names[id(table)]
        if forms.get(tied) == "rows int4" and owner in found:
            found[tied] = owner
    return found


def quantized_weight(module: nn.Linear | nn.Embedding) -> tuple[Tensor, Tensor]:
    """The integers and scales of a quantized layer: weight = q · scale.

    Args:
        module: A linear layer or an embedding that ``quantize`` has changed.

    Returns:
        q int8 [out, in] (an embedding: [rows, dim]; 4-bit values are in [-8, 7]) and scale
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
    """A copy with plain float32 weights of exactly q · scale, and no other quantization.

    Activations are not quantized. So its distance to the quantized model is the error from
    activations, and its distance to the float32 model is the error from weights.
    """
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and is_quantized(module):
            _replace(module, values_of(*quantized_weight(module)))
    return plain


def values_of(data: Tensor, scale: Tensor) -> Tensor:
    """q · scale: float32 [out, in] from q int8 [out, in] and scale float32 [out, groups]."""
    return (data.float().unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)


def rounded(weight: Tensor, form: Form | None) -> Tensor:
    """The float32 values q · scale that ship for one linear weight [out, in].

    Exactly the values that ``quantize`` and ``dequantize`` give without calibration text; for
    quantization-aware training.

    Args:
        weight: float32 [out, in].
        form: How it ships (``plan``); None for float32.
    """
    return weight if form is None else values_of(*_parts(quantized(weight, form)))


def as_shipped(
    model: PreTrainedModel,
    how: Quantization | str,
    keep: Iterable[str] = (),
    known: KnownIntegers | None = None,
) -> PreTrainedModel:
    """A plain float32 copy of a model with the values that ship.

    Args:
        model: A float32 decoder; not changed.
        how: How it is quantized; a precision stands for its defaults.
        keep: Linear layers that keep their float weights, since they are rounded later together
            with an update (``rounded``).
        known: Integers to take in place of quantizing.
    """
    how = Quantization(how) if isinstance(how, str) else how
    forms = plan_of(model, how)
    plain = dequantize(quantize(copy.deepcopy(model), how.precision, forms, known))
    for name in keep:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        _replace(plain.get_submodule(name), weight.detach().clone())
    return plain


def _check_matrices(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1:
                    raise InputError(
                        f"{name}.{key}: a weight matrix in a {type(module).__name__} cannot be "
                        "quantized; expected linear layers and embeddings only, or precision fp32"
                    )


def _untie(model: PreTrainedModel) -> None:
    """Give a tied head its own weight: head and embedding are quantized differently."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def _replace(module: nn.Module, weight: Tensor) -> None:
    module.weight = nn.Parameter(weight, requires_grad=False)


def quantized(weight: Tensor, form: Form) -> Tensor:
    """Quantize a float weight [out, in] with ``integers``, as a torchao tensor."""
    rows, width = weight.shape
    parts = list(integers(lambda start, stop: weight[start:stop], rows, width, form))
    data = torch.cat([unpacked(data) if form.endswith("int4") else data for data, _ in parts])
    scale = torch.cat([scale for _, scale in parts]).float()
    return torchao_tensor(data, scale, form)


def torchao_tensor(data: Tensor, scale: Tensor, form: Form) -> Tensor:
    """Integers and scales as a torchao tensor, which eager PyTorch runs and exporters support.

    Args:
        data: int8 [out, in].
        scale: float32 [out, groups].
        form: The layer's form.
    """
    return _tensor_type()(
        qdata=data,
        scale=scale,
        zero_point=torch.zeros(scale.shape, dtype=torch.int8),
        target_dtype=_INT4 if form.endswith("int4") else torch.int8,
        block_size=(1, data.shape[1] // scale.shape[1]),
        dtype=torch.float32,
        activation_quantization=None if form.startswith("rows") else _PER_TOKEN,
    )


def unpacked(data: Tensor) -> Tensor:
    """Unpack 4-bit values to int8 [n, width] from uint8 [n, width / 2], two in a byte.

    Both runtimes use this packing: the first value in the low half, each offset by 8.
    """
    return torch.stack([data & 15, data >> 4], dim=-1).flatten(1).to(torch.int8) - 8


def _tensor_type() -> Any:
    with quiet():
        from torchao.quantization import IntxUnpackedToInt8Tensor
    return IntxUnpackedToInt8Tensor
