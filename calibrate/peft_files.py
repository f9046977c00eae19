"""Read and write LoRA adapters as PEFT directories.

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors``. ``read_adapter`` reads
an adapter only if PEFT's forward pass with it is that of one set of weights, which a fold makes;
``read_peft`` only if it is W0·x + B·(A·x). All others are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from caliport.calibrate.adapter import Adapter
from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.mlx_adapter import is_mlx, mlx_adapter
from caliport.calibrate.names import Key, parse_key
from caliport.calibrate.peft_settings import LoraSettings, read_config, read_settings
from caliport.core.errors import InputError
from caliport.core.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MLX_WEIGHTS
from caliport.core.model_files.tensor_files import read_header
from caliport.core.untrusted import check_regular, shown

if TYPE_CHECKING:
    from torch import nn

_PREFIX = "base_model.model."
_MOST_BYTES = 32 * 2**30
_FLOATS = ("F64", "F32", "F16", "BF16")
# Training state of VeLoRA and MonteCLoRA, whose forward in eval mode is a plain LoRA's.
_TRAINING_STATE = (".lora_velora_embed", ".lora_monteclora_sampler.")

_FOLD = "fold it into the base with caliport export"
_BEYOND = {
    "use_dora": "DoRA rescales each row of W0 + ΔW, which is no low-rank update; "
    f"{_FOLD}, or take the nearest low-rank update with caliport calibrate --dora svd",
    "lora_bias": f"it adds a bias beside ΔW; retrain without it or {_FOLD}",
    "modules_to_save": f"it replaces whole layers of the base; retrain without it or {_FOLD}",
    "bias": f"the base's biases were trained too, expected none; retrain without them or {_FOLD}",
    "embedding": "LoRA on an embedding looks A up by token, it is no update of a linear layer; "
    f"retrain without the embedding in target_modules or {_FOLD}",
}


def read_peft(directory: str | Path, *, zero: bool = False) -> LowRankUpdate:
    """Read a LoRA directory as updates of linear layers; the scaling (α/r or α/√r) goes into B.

    Args:
        directory: A PEFT or mlx-lm LoRA directory.
        zero: Whether an adapter that changes nothing is allowed.

    Raises:
        InputError: See ``read_adapter``; or the adapter's effect is not B·A on linear layers (DoRA,
            biases, fully trained modules, LoRA on embeddings, …). The message names the setting
            or tensor and the reason.
    """
    return read_adapter(directory, zero=zero).low_rank(directory)


def read_update(
    directory: str | Path, model: nn.Module, read: Callable[[str], Tensor] | None = None
) -> LowRankUpdate:
    """As ``read_peft``, for a base that is known, with the base's names of modules.

    Args:
        directory: A PEFT or mlx-lm LoRA directory.
        model: The base, on any device.
        read: Reads a parameter of the base by name; default from ``model``.

    Raises:
        InputError: See ``read_peft``; or it does not fit the base.
    """
    adapter = read_adapter(directory).fitted(model, directory)
    return adapter.check_saved(read or model.get_parameter, directory).low_rank(directory)


def read_adapter(directory: str | Path, *, zero: bool = False) -> Adapter:
    """Read a LoRA directory with all that it changes in a base.

    Args:
        directory: A PEFT or mlx-lm LoRA directory.
        zero: Whether an adapter that changes nothing is allowed.

    Raises:
        InputError: The directory or a file is missing; the weights are pickled, truncated or not
            finite, or all ΔW are 0; or settings or tensors whose effect is not that of changed
            weights or not known to this version. The message names the setting or tensor.
    """
    directory = Path(directory)
    config = read_config(directory)
    if is_mlx(config):
        path = directory / MLX_WEIGHTS
        tensors = read_floats(path, directory)
        adapter = mlx_adapter(directory, config, tensors, _BEYOND["use_dora"])
    else:
        path = directory / ADAPTER_WEIGHTS
        adapter = _peft_adapter(directory, read_settings(directory, config))
    _check_finite(adapter, path)
    if not zero and adapter.is_zero:
        raise InputError(f"{directory}: the adapter changes nothing, all ΔW are 0; was it trained?")
    return adapter


def write_peft(update: LowRankUpdate, directory: str | Path, base: str | None = None) -> None:
    """Write a PEFT LoRA directory that PEFT loads to the same ΔW (α = r, so scaling 1).

    PEFT has no rank 0: a module of rank 0 is written as rank 1 with A = 0 and B = 0.

    Args:
        update: The adapter.
        directory: Where to write; created if missing.
        base: The base model's directory or hub name, for ``base_model_name_or_path``.

    Raises:
        InputError: Values that are not finite or beyond ``low_rank.LARGEST``.
    """
    from peft import LoraConfig

    update.check_finite("the result")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    ranks = {name: max(update.rank(name), 1) for name in update.modules}
    most = max(ranks.values())
    odd = {name: rank for name, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=dict(odd),
        alpha_pattern=dict(odd),
        target_modules=list(update.modules),
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base,
    )
    config.save_pretrained(str(directory))
    # PEFT 0.21 holds target_modules as a set, so their order in the file would differ by run.
    path = directory / ADAPTER_CONFIG
    content = {**json.loads(path.read_text(encoding="utf-8")), "target_modules": update.modules}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {}
    for name in update.modules:
        a, b = update.a[name], update.b[name]
        if update.rank(name) == 0:
            a, b = a.new_zeros(1, a.shape[1]), b.new_zeros(b.shape[0], 1)
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _peft_adapter(directory: Path, settings: LoraSettings) -> Adapter:
    path = directory / ADAPTER_WEIGHTS
    parts: dict[str, dict[str, Tensor]] = {}
    copied: set[str] = set()
    tensors = _read_tensors(directory)
    keys = {key: parse_key(key, path) for key in tensors}
    _check_one_adapter(keys, path)
    for key, tensor in tensors.items():
        found = keys[key]
        if parts.setdefault(found.part, {}).setdefault(found.name, tensor) is not tensor:
            raise InputError(f"{path}: {key}: {found.name} is in the file twice")
        if found.copied:
            copied.add(found.name)
    pairs = {end: _pair(parts, end, path) for end in ("", "embedding_")}
    names = sorted(name for a, _ in pairs.values() for name in a)
    if not names:
        raise InputError(f"{path}: no LoRA matrices; expected …lora_A.weight, …lora_B.weight")
    scalings = settings.scalings(names)
    for a, b in pairs.values():
        for name in a:
            rank, scaling = scalings[name]
            if a[name].shape[0] != rank or b[name].shape[1] != rank:
                raise InputError(
                    f"{path}: {name} has rank {a[name].shape[0]} and {b[name].shape[1]}, "
                    f"{ADAPTER_CONFIG} says {rank}"
                )
            b[name] = b[name] * scaling
    own, embeddings = pairs.values()
    others, biases = parts.get("parameter", {}), parts.get("bias", {})
    trained = {n for n in others if _is_trained(n, n in copied, settings)}
    adapter = Adapter(
        LowRankUpdate(*own),
        # PEFT looks A up by token and multiplies with B: ΔW [rows, width] is their transpose.
        LowRankUpdate(
            {n: t.T.contiguous() for n, t in embeddings[1].items()},
            {n: t.T.contiguous() for n, t in embeddings[0].items()},
        ),
        magnitudes={n: t.float() for n, t in parts.get("magnitude_vector", {}).items()},
        biases={n: t.float() * scalings.get(n, (1, 1.0))[1] for n, t in biases.items()},
        replaced={n: t.float() for n, t in others.items() if n in trained},
        saved={n: t for n, t in others.items() if n not in trained},
        bias=settings.bias,
        beyond=_beyond(settings, directory, keys),
    )
    _check_parts(adapter, settings, path)
    return adapter


def _check_one_adapter(keys: Mapping[str, Key], path: Path) -> None:
    names = sorted({key.adapter for key in keys.values() if key.adapter is not None})
    if len(names) > 1:
        raise InputError(
            f"{path}: has adapters {', '.join(names[:4])}; expected one adapter in a file"
        )


def _pair(
    parts: Mapping[str, dict[str, Tensor]], start: str, path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A and B by module in float32."""
    a, b = parts.get(f"{start}A", {}), parts.get(f"{start}B", {})
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            raise InputError(f"{path}: {name} has only one of lora_{start}A and lora_{start}B")
        for tensor in (a[name], b[name]):
            if tensor.dim() != 2 or not tensor.numel():
                raise InputError(
                    f"{path}: {name} has a LoRA of shape {tuple(tensor.shape)}, expected a "
                    "matrix; only LoRA on linear layers is supported"
                )
    return {n: t.float() for n, t in a.items()}, {n: t.float() for n, t in b.items()}


def _is_trained(name: str, copied: bool, settings: LoraSettings) -> bool:
    """Whether a parameter was trained, not just saved along."""
    is_bias = settings.bias != "none" and name.endswith(".bias")
    return copied or is_bias or settings.is_copied(name)


def _beyond(settings: LoraSettings, directory: Path, keys: Mapping[str, Key]) -> dict[str, str]:
    """Why an adapter is more than updates of linear layers, by the setting."""
    config, weights = settings.path, directory / ADAPTER_WEIGHTS
    modules = list(settings.modules_to_save)
    found = {
        "use_dora": f"{config}: use_dora = True" if settings.dora else "",
        "lora_bias": f"{config}: lora_bias = True" if settings.lora_bias else "",
        "modules_to_save": f"{config}: modules_to_save = {modules!r}" if modules else "",
        "bias": f"{config}: bias = {settings.bias!r}" if settings.bias != "none" else "",
    }
    for key, one in keys.items():
        if one.part.startswith("embedding"):
            found.setdefault("embedding", f"{weights}: {key}")
        elif one.part == "magnitude_vector":
            found["use_dora"] = found["use_dora"] or f"{weights}: {key}"
        elif one.part == "bias":
            found["lora_bias"] = found["lora_bias"] or f"{weights}: {key}"
        elif one.copied:
            found["modules_to_save"] = found["modules_to_save"] or f"{weights}: {key}"
    return {kind: f"{what}: {_BEYOND[kind]}" for kind, what in found.items() if what}


def _check_parts(adapter: Adapter, settings: LoraSettings, path: Path) -> None:
    """Check that the parts belong together, and are those that the settings name."""
    modules = set(adapter.update.modules)
    both = modules | {*adapter.embeddings.modules}
    wanted = {
        "use_dora": (settings.dora, "lora_magnitude_vector", adapter.magnitudes, both),
        "lora_bias": (settings.lora_bias, "lora_B.bias", adapter.biases, modules),
    }
    for field, (stated, tensor, found, having) in wanted.items():
        odd = sorted(having ^ found.keys() if stated else found.keys())
        if odd:
            has = "a" if odd[0] in found else "no"
            raise InputError(
                f"{path}: {odd[0]} has {has} {tensor}, {ADAPTER_CONFIG} has {field} = {stated}; "
                "expected one for each module, or none"
            )
    for end in settings.modules_to_save:
        if not any(end in name for name in adapter.replaced):
            raise InputError(
                f"{path}: has nothing of {end!r}, which {ADAPTER_CONFIG} names in modules_to_save"
            )
    twice = sorted(both & {n.removesuffix(".weight") for n in adapter.replaced})
    if twice:
        raise InputError(f"{path}: {twice[0]} has a LoRA and a new weight; expected one of the two")


def _check_finite(adapter: Adapter, path: Path) -> None:
    adapter.update.check_finite(path)
    adapter.embeddings.check_finite(path)
    more = (adapter.magnitudes, adapter.biases, adapter.replaced, adapter.saved)
    for name, values in (item for part in more for item in part.items()):
        if not values.isfinite().all():
            raise InputError(f"{path}: {name} holds values that are not finite")


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors that decide what the adapter computes, of floating-point types."""
    path = directory / ADAPTER_WEIGHTS
    pickled = directory / "adapter_model.bin"
    if not path.exists() and pickled.is_file():
        raise InputError(
            f"{pickled}: pickled weights, expected {ADAPTER_WEIGHTS}; pickles are not read"
        )
    return read_floats(path, directory)


def read_floats(path: Path, root: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, without training state; all of floating-point types.

    Raises:
        InputError: A file that cannot be read or is outside ``root``, or a tensor of another type.
    """
    header = read_header(path, root)
    check_regular(path, _MOST_BYTES)
    wanted = {k: t for k, t in header.items() if not any(mark in k for mark in _TRAINING_STATE)}
    for key, entry in wanted.items():
        if entry.dtype not in _FLOATS:
            raise InputError(
                f"{path}: {shown(key)} is of type {shown(entry.dtype)}, expected one of "
                f"{', '.join(_FLOATS)}"
            )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None
    return {key: tensors[key] for key in wanted}
