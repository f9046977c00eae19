"""Eager reference models with float weights that quantize activations as a runtime's kernels do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from caliport.export.quantization.choices import GROUP_SIZE, row_scale_block
from caliport.export.quantization.tensors import dequantize, is_quantized, quantized_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LARGEST = 127


def in_blocks(model: PreTrainedModel, precision: str) -> PreTrainedModel:
    """The eager model whose logits the ONNX artifact should reproduce.

    ONNX Runtime's ``MatMulNBits`` with ``accuracy_level`` 4 quantizes its input by block of the
    inner dimension, torchao's tensors by token, so the result of ``quantize`` is not what the
    artifact computes. This model has the same integers and quantizes its inputs as the x86 kernels
    of ONNX Runtime 1.31 do (AVX2 and later). On Arm, builds with KleidiAI quantize the inputs of
    4-bit products by token, as torchao's tensors do; there this reference is only approximate.

    Args:
        model: As loaded (``fp32``) or changed by ``caliport.export.quantization.tensors.quantize``.
        precision: One of ``caliport.export.quantization.tensors.PRECISIONS``.

    Returns:
        ``model`` itself for ``fp32``, otherwise a copy with float weights.
    """
    if precision == "fp32":
        return model
    plain = dequantize(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_quantized(module):
            _, scale = quantized_weight(module)
            grouped = scale.shape[1] > 1
            block = GROUP_SIZE if grouped else row_scale_block(module.in_features)
            quantize_inputs(plain.get_submodule(name), block)
    return plain


def by_token(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, to the last bit, with float weights.

    torchao's tensors dequantize theirs in every call, which takes longer than a decode step's
    product. Inputs are rounded by torchao's own function.

    Args:
        model: As changed by ``caliport.export.quantization.tensors.quantize``.

    Returns:
        A copy.
    """
    from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as intx

    rounded = intx._apply_int8_act_asym_per_token_quant_dequant
    plain = dequantize(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_quantized(module):
            plain.get_submodule(name).register_forward_pre_hook(
                lambda _, args: (rounded(args[0]), *args[1:])
            )
    return plain


def quantize_inputs(module: nn.Module, block: int) -> None:
    """Make a layer round its input with ``quantize_blocks`` in every later call."""
    module.register_forward_pre_hook(lambda _, args: (quantize_blocks(args[0], block), *args[1:]))


def quantize_blocks(values: Tensor, block: int) -> Tensor:
    """Round to signed 8 bits, one scale absmax / 127 per block of the last dimension.

    Ties round to the even integer. A partial last block is scaled by the values it has.

    Args:
        values: float32 [..., n].
        block: Values per block.

    Returns:
        float32 [..., n], each value an integer in [-127, 127] times its block's scale.
    """
    size = values.shape[-1]
    padded = nn.functional.pad(values, (0, -size % block)).unflatten(-1, (-1, block))
    largest = padded.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, _LARGEST / largest, 0.0)
    rounded = torch.round(padded * inverse) * (largest / _LARGEST)
    return rounded.flatten(-2)[..., :size]
