"""Read and write LoRA adapters as PEFT directories.

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors``. ``read_peft`` accepts
an adapter only if PEFT's forward pass with it is W0·x + B·(A·x); it refuses all others by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from caliport.calibrate.low_rank import LowRankUpdate
from caliport.core.errors import InputError
from caliport.core.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from caliport.core.model_files.tensor_files import check_safetensors

_PREFIX = "base_model.model."

# Settings with which the adapter is not W0 + B·A of the published base, and why. From PEFT
# 0.21.2's LoraConfig and LoRA variants; a test compares the lists with its fields.
_REFUSED = {
    "use_dora": "DoRA rescales each row of W0 + ΔW, which is no low-rank update; "
    "retrain without DoRA or merge it into the base",
    "lora_bias": "it adds a bias beside ΔW; retrain without it or merge it into the base",
    "modules_to_save": "it replaces whole layers of the base; "
    "retrain without it or merge it into the base",
    "trainable_token_indices": "it replaces rows of the embedding; "
    "retrain without it or merge it into the base",
    "target_parameters": "it updates bare parameters, not linear layers; "
    "retrain with target_modules or merge it into the base",
    "layer_replication": "it belongs to a base whose layers are repeated; save that base as a "
    "checkpoint of its own and retrain on it",
    "use_qalora": "QA-LoRA averages the inputs in groups before A, and its A is [R, groups]; "
    "retrain without it",
    "use_bdlora": "BD-LoRA saves only the blocks of a block-diagonal A or B; retrain without it",
    "alora_invocation_tokens": "aLoRA adds ΔW only from its invocation tokens on, which no fixed "
    "W0 + ΔW does; retrain without it",
    "arrow_config": "Arrow chooses among adapters token by token, which no fixed ΔW does; "
    "give the adapters it chooses from",
    "kasa_config": "KaSA cuts the smallest singular values off the base's weights, so it does not "
    "fit the base as published; retrain without it or merge it into the base",
    "megatron_config": "it belongs to Megatron's parallel layers; retrain on the Hugging Face "
    "checkpoint",
}

# Settings that read_peft uses; settings about training or target layers, which do not change what
# the adapter computes; and initialisations that do not change the base.
# fan_in_fan_out: the base stores its weight transposed; A and B are the same.
# fmt: off
_READ = frozenset((
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
    "fan_in_fan_out", "bias", "init_lora_weights",
))
_HARMLESS = frozenset((
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "runtime_config", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "lora_dropout", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config",
    "qalora_group_size", "ensure_weight_tying",
))
_STARTS = frozenset(("true", "false", "none", "gaussian", "eva", "orthogonal", "mica"))
# fmt: on
# Initialisations that also change the base's weights, so that the adapter fits only that base.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")

# Training state of VeLoRA and MonteCLoRA, whose forward in eval mode is a plain LoRA's.
_TRAINING_STATE = (".lora_velora_embed", ".lora_monteclora_sampler.")

_OTHER_TENSORS = {
    ".lora_embedding_": "LoRA on an embedding looks A up by token, it is no update of a linear "
    "layer; retrain without the embedding in target_modules or merge it into the base",
    ".lora_magnitude_vector": _REFUSED["use_dora"],
    ".lora_B.bias": _REFUSED["lora_bias"],
    ".base_layer.": "a layer of the base saved along with the adapter, which may differ from the "
    "base as published; save the adapter again with save_embedding_layers=False",
}


def read_peft(directory: str | Path) -> LowRankUpdate:
    """Read a PEFT LoRA directory; the scaling (α/r, or α/√r for rsLoRA) goes into B.

    Raises:
        InputError: The directory or a file is missing; the weights are pickled, truncated or not
            finite; or the adapter's effect is not B·A on linear layers (DoRA, biases, fully
            trained modules, LoRA on embeddings, …) or not known to this version. The message
            names the setting or tensor and the reason.
    """
    directory = Path(directory)
    config = _read_config(directory)
    weights = directory / ADAPTER_WEIGHTS
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    for key, tensor in _read_tensors(directory).items():
        name, side = _parse_key(key, weights)
        (a if side == "A" else b)[name] = tensor.to(torch.float32)
    if not a:
        raise InputError(f"{weights}: no LoRA matrices; expected …lora_A.weight, …lora_B.weight")
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b:
            raise InputError(f"{weights}: {name} has only one of lora_A and lora_B")
        rank, alpha = _rank_and_alpha(config, name)
        if a[name].shape[0] != rank or b[name].shape[1] != rank:
            raise InputError(
                f"{weights}: {name} has rank {a[name].shape[0]} and {b[name].shape[1]}, "
                f"{ADAPTER_CONFIG} says {rank}"
            )
        b[name] = b[name] * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return LowRankUpdate(a, b)


def write_peft(update: LowRankUpdate, directory: str | Path, base: str | None = None) -> None:
    """Write a PEFT LoRA directory that PEFT loads to the same ΔW (α = r, so scaling 1).

    PEFT has no rank 0: a module of rank 0 is written as rank 1 with A = 0 and B = 0.

    Args:
        update: The adapter.
        directory: Where to write; created if missing.
        base: The base model's directory or hub name, for ``base_model_name_or_path``.
    """
    from peft import LoraConfig

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


def check_same_base(directories: Sequence[str | Path]) -> None:
    """Check that PEFT adapters name one base: equal last path components, whatever their case.

    Adapters may refer to one base at different paths, so only the last component is compared (for
    a hub cache, models--ORG--NAME/snapshots/HASH, that is NAME). Adapters that name no base are not
    compared; nor are revisions that are missing or "main", which moves.

    Raises:
        InputError: A directory without a readable ``adapter_config.json``, or two adapters that
            name different bases or different revisions of one.
    """
    first: tuple[str, str, Path] | None = None
    revised: tuple[str, str, Path] | None = None
    for directory in map(Path, directories):
        config = _read_json(directory)
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
        if not isinstance(base, str) or not base.strip():
            continue
        first = first or (_base_name(base), base, directory)
        if _base_name(base) != first[0]:
            raise InputError(
                f"{directory / ADAPTER_CONFIG}: base {base}, but {first[2] / ADAPTER_CONFIG} "
                f"has base {first[1]}; expected adapters of one base"
            )
        if isinstance(revision, str) and revision not in ("", "main"):
            revised = revised or (revision, base, directory)
            if revision != revised[0]:
                raise InputError(
                    f"{directory / ADAPTER_CONFIG}: base {base} at revision {revision}, but "
                    f"{revised[2] / ADAPTER_CONFIG} has base {revised[1]} at revision "
                    f"{revised[0]}; expected adapters of one base"
                )


def _base_name(base: str) -> str:
    parts = [part for part in base.strip().lower().replace("\\", "/").split("/") if part]
    if len(parts) > 2 and parts[-2] == "snapshots":
        return parts[-3].rpartition("--")[2]
    return parts[-1] if parts else ""


def _read_json(directory: Path) -> dict[str, Any]:
    path = directory / ADAPTER_CONFIG
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; expected a PEFT LoRA adapter")
    if not path.is_file():
        raise InputError(f"{directory}: no {ADAPTER_CONFIG}; expected a PEFT LoRA adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"{path}: peft_type is {kind}, expected LORA")
    return config


def _read_config(directory: Path) -> dict[str, Any]:
    config, path = _read_json(directory), directory / ADAPTER_CONFIG
    for field, value in config.items():
        if value and field in _REFUSED:
            raise InputError(f"{path}: {field} = {value!r}: {_REFUSED[field]}")
        if value and field not in _READ | _HARMLESS:
            raise InputError(
                f"{path}: {field} = {value!r} is not known here and may change what the adapter "
                "computes; expected a plain LoRA"
            )
    if config.get("bias", "none") != "none":
        raise InputError(
            f"{path}: bias = {config['bias']!r}: the base's biases were trained too, expected "
            "none; retrain without them or merge the adapter into the base"
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        raise InputError(
            f"{path}: init_lora_weights = {start!r} changes the base's weights; convert the "
            "adapter to a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)"
        )
    if start not in _STARTS:
        raise InputError(
            f"{path}: init_lora_weights = {start!r} is not known here and may change the base's "
            f"weights; expected one of {', '.join(sorted(_STARTS))}"
        )
    numbers = {field: config.get(field) for field in ("r", "lora_alpha")}
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(field) or {}
        if not isinstance(pattern, dict):
            raise InputError(f"{path}: {field} is {pattern!r}, expected a mapping to numbers")
        numbers |= {f"{field}.{key}": value for key, value in pattern.items()}
    for field, value in numbers.items():
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise InputError(f"{path}: {field} is {value!r}, expected a positive number")
    return config


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors that decide what the adapter computes, all finite matrices."""
    path = directory / ADAPTER_WEIGHTS
    pickled = directory / "adapter_model.bin"
    if not path.is_file() and pickled.is_file():
        raise InputError(
            f"{pickled}: pickled weights, expected {ADAPTER_WEIGHTS}; pickles are not read"
        )
    check_safetensors(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None
    for mark, reason in _OTHER_TENSORS.items():
        for key in tensors:
            if mark in key:
                raise InputError(f"{path}: {key}: {reason}")
    tensors = {k: t for k, t in tensors.items() if not any(mark in k for mark in _TRAINING_STATE)}
    for key, tensor in tensors.items():
        if key.endswith(".weight") and ".lora_" in key and tensor.dim() != 2:
            raise InputError(
                f"{path}: {key} has shape {tuple(tensor.shape)}, expected a matrix; "
                "only LoRA on linear layers is supported"
            )
        if not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {key} holds values that are not finite")
    return tensors


def _parse_key(key: str, file: Path) -> tuple[str, str]:
    for side in ("A", "B"):
        tail = f".lora_{side}.weight"
        if key.endswith(tail):
            return key.removesuffix(tail).removeprefix(_PREFIX), side
    raise InputError(f"{file}: {key} is not a LoRA matrix of a linear layer; refused, not dropped")


def _rank_and_alpha(config: dict[str, Any], name: str) -> tuple[int, float]:
    rank, alpha = config["r"], config["lora_alpha"]
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        from peft.utils.other import get_pattern_key

        ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        rank = ranks.get(get_pattern_key(list(ranks), name), rank)
        alpha = alphas.get(get_pattern_key(list(alphas), name), alpha)
    return int(rank), float(alpha)
