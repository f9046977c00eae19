"""Read LoRA adapters as mlx-lm writes them: ``adapters.safetensors`` and its own settings.

A layer has ``lora_a`` [in, R] and ``lora_b`` [R, out] with ΔW = scale·(lora_a·lora_b)ᵀ, and with
DoRA the magnitudes ``m`` [out]. Names are those of the model; mlx-lm has the Hugging Face's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from caliport.calibrate.adapter import Adapter
from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.names import check_name
from caliport.core.errors import InputError
from caliport.core.files import ADAPTER_CONFIG, MLX_WEIGHTS
from caliport.core.untrusted import mapping, number, shown

_KINDS = ("lora", "dora")
_KNOWN = frozenset(("rank", "scale", "alpha", "dropout", "keys"))
_PARTS = ("lora_a", "lora_b", "m")


def is_mlx(config: Mapping[str, Any]) -> bool:
    """Whether an ``adapter_config.json`` is mlx-lm's."""
    return "peft_type" not in config and "lora_parameters" in config


def mlx_adapter(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], dora: str
) -> Adapter:
    """The adapter of an mlx-lm directory.

    Args:
        directory: The adapter's.
        config: Its settings.
        tensors: Its tensors.
        dora: Why one with DoRA is more than a low-rank update.

    Raises:
        InputError: Settings that are missing or not known here, or tensors that are not those of a
            LoRA on linear layers.
    """
    path, weights = directory / ADAPTER_CONFIG, directory / MLX_WEIGHTS
    kind = config.get("fine_tune_type", "lora")
    if kind not in _KINDS:
        raise InputError(
            f"{path}: fine_tune_type is {shown(kind)}, expected one of {', '.join(_KINDS)}"
        )
    rank, scale = _rank_and_scale(config, path)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for key, tensor in tensors.items():
        check_name(key, weights)
        name, _, part = key.rpartition(".")
        if part not in parts or not name:
            raise InputError(f"{weights}: {key} is not a LoRA matrix; refused, not dropped")
        if tensor.dim() != (1 if part == "m" else 2) or not tensor.numel():
            raise InputError(
                f"{weights}: {key} has shape {tuple(tensor.shape)}, expected a matrix (lora_a, "
                "lora_b) or a vector (m); only LoRA on linear layers is supported"
            )
        parts[part][name] = tensor.float()
    a, b, magnitudes = parts.values()
    if not a:
        raise InputError(f"{weights}: no LoRA matrices; expected …lora_a and …lora_b")
    wanted = a.keys() if kind == "dora" else set()
    odd = sorted((a.keys() ^ b.keys()) | (magnitudes.keys() ^ wanted))
    if odd:
        raise InputError(
            f"{weights}: {odd[0]} has not the parts of fine_tune_type {kind}: lora_a, lora_b"
            f"{' and m' if kind == 'dora' else ''}"
        )
    for name in a:
        if a[name].shape[1] != rank or b[name].shape[0] != rank:
            raise InputError(
                f"{weights}: {name} has rank {a[name].shape[1]} and {b[name].shape[0]}, "
                f"{ADAPTER_CONFIG} says {rank}"
            )
    return Adapter(
        LowRankUpdate(
            {name: t.T.contiguous() for name, t in a.items()},
            {name: t.T.contiguous() * scale for name, t in b.items()},
        ),
        magnitudes=magnitudes,
        beyond={"use_dora": f"{path}: fine_tune_type = 'dora': {dora}"} if kind == "dora" else {},
    )


def _rank_and_scale(config: Mapping[str, Any], path: Path) -> tuple[int, float]:
    found = mapping(config.get("lora_parameters"), f"{path}: lora_parameters")
    for field in found:
        if field not in _KNOWN:
            raise InputError(
                f"{path}: lora_parameters has {shown(field)}, which is not known here and may "
                "change what the adapter computes"
            )
    rank = int(number(found.get("rank"), f"{path}: lora_parameters.rank", 1, 2**16, whole=True))
    scale = number(found.get("scale"), f"{path}: lora_parameters.scale", 1e-30, 1e30)
    if found.get("alpha") not in (None, rank):
        raise InputError(
            f"{path}: lora_parameters has alpha {shown(found['alpha'])}: versions of mlx-lm scale "
            "by scale·alpha/rank or by scale alone; write the product that yours used as scale "
            "and leave alpha out"
        )
    return rank, float(scale)
