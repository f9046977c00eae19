"""The settings of a PEFT LoRA adapter, ``adapter_config.json``, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caliport.calibrate.patterns import match_patterns
from caliport.core.errors import InputError, printable
from caliport.core.files import ADAPTER_CONFIG
from caliport.core.untrusted import mapping, number, read_object, shown

# Settings with which the adapter is not W0 + B·A of the published base, and why. From PEFT
# 0.21.2's LoraConfig and LoRA variants; a test compares the lists with its fields.
REFUSED = {
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

# Settings that are read; settings about training or target layers, which do not change what
# the adapter computes; and initialisations that do not change the base.
# fan_in_fan_out: the base stores its weight transposed; A and B are the same.
# fmt: off
READ = frozenset((
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
    "fan_in_fan_out", "bias", "init_lora_weights", "use_dora", "lora_bias", "modules_to_save",
))
HARMLESS = frozenset((
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

_MOST_RANK = 2**16
_ALPHA = (1e-30, 1e30)
_BIAS = ("none", "all", "lora_only")


@dataclass(frozen=True)
class LoraSettings:
    """What the settings say about the weights.

    Attributes:
        path: The file, for messages.
        rank: ``r``.
        alpha: ``lora_alpha``.
        ranks: ``rank_pattern``.
        alphas: ``alpha_pattern``.
        root: Whether the scaling is α/√r (rsLoRA) instead of α/r.
        dora: Whether each module has magnitudes.
        lora_bias: Whether B has a bias.
        bias: ``none``, or which biases of the base were trained.
        modules_to_save: Ends of names of modules that were trained whole.
    """

    path: Path
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    root: bool
    dora: bool
    lora_bias: bool
    bias: str
    modules_to_save: tuple[str, ...]

    def scalings(self, names: Iterable[str]) -> dict[str, tuple[int, float]]:
        """Rank and scaling of each module.

        Raises:
            InputError: A pattern that cannot be used (``match_patterns``).
        """
        order = list(names)
        ranks = match_patterns(self.ranks, order, f"{self.path}: rank_pattern")
        alphas = match_patterns(self.alphas, order, f"{self.path}: alpha_pattern")
        found = {}
        for name in order:
            rank, alpha = int(ranks.get(name, self.rank)), alphas.get(name, self.alpha)
            found[name] = rank, alpha / (math.sqrt(rank) if self.root else rank)
        return found

    def is_copied(self, parameter: str) -> bool:
        """Whether a parameter is in one of ``modules_to_save``, as PEFT matches them."""
        parts = parameter.split(".")
        modules = [".".join(parts[:end]) for end in range(1, len(parts))]
        return any(m.endswith(self.modules_to_save) for m in modules)


def read_config(directory: Path) -> dict[str, Any]:
    """The JSON object of an adapter's settings, not checked further.

    Raises:
        InputError: No such directory or file, or not a JSON object.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; expected a PEFT LoRA adapter")
    path = directory / ADAPTER_CONFIG
    if not path.exists():
        raise InputError(f"{directory}: no {ADAPTER_CONFIG}; expected a PEFT LoRA adapter")
    return read_object(path, root=directory)


def check_lora(directory: Path, config: Mapping[str, Any]) -> None:
    """Check that settings are those of a LoRA.

    Raises:
        InputError: Another ``peft_type``.
    """
    if config.get("peft_type") != "LORA":
        kind = shown(config.get("peft_type"))
        raise InputError(f"{directory / ADAPTER_CONFIG}: peft_type is {kind}, expected LORA")


def read_settings(directory: Path, config: Mapping[str, Any]) -> LoraSettings:
    """Check an adapter's settings.

    Args:
        directory: The adapter's.
        config: From ``read_config``.

    Raises:
        InputError: A setting that is not known here, changes the base or is out of range; the
            message names it and the reason.
    """
    path = directory / ADAPTER_CONFIG
    check_lora(directory, config)
    for field, value in config.items():
        if value and field in REFUSED:
            raise InputError(f"{path}: {field} = {shown(value)}: {REFUSED[field]}")
        if value and field not in READ | HARMLESS:
            raise InputError(
                f"{path}: {printable(field, 60)} = {shown(value)} is not known here and may change "
                "what the adapter computes; expected a plain LoRA"
            )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        raise InputError(
            f"{path}: init_lora_weights = {shown(start)} changes the base's weights; convert the "
            "adapter to a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)"
        )
    if start not in _STARTS:
        raise InputError(
            f"{path}: init_lora_weights = {shown(start)} is not known here and may change the "
            f"base's weights; expected one of {', '.join(sorted(_STARTS))}"
        )
    bias = config.get("bias", "none") or "none"
    if bias not in _BIAS:
        raise InputError(f"{path}: bias is {shown(bias)}, expected one of {', '.join(_BIAS)}")
    return LoraSettings(
        path,
        int(_rank(config.get("r"), f"{path}: r")),
        number(config.get("lora_alpha"), f"{path}: lora_alpha", *_ALPHA),
        {key: _rank(value, where) for key, where, value in _pattern(config, "rank_pattern", path)},
        {
            key: number(value, where, *_ALPHA)
            for key, where, value in _pattern(config, "alpha_pattern", path)
        },
        root=_flag(config, "use_rslora", path),
        dora=_flag(config, "use_dora", path),
        lora_bias=_flag(config, "lora_bias", path),
        bias=bias,
        modules_to_save=_names(config.get("modules_to_save"), f"{path}: modules_to_save"),
    )


def _rank(value: object, where: str) -> int:
    return int(number(value, where, 1, _MOST_RANK, whole=True))


def _pattern(
    config: Mapping[str, Any], field: str, path: Path
) -> Iterator[tuple[str, str, object]]:
    """Keys of a pattern, what to name them in messages, and values."""
    for key, value in mapping(config.get(field) or {}, f"{path}: {field}").items():
        yield key, f"{path}: {field}.{printable(key, 60)}", value


def _flag(config: Mapping[str, Any], field: str, path: Path) -> bool:
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{path}: {field} is {shown(value)}, expected true or false")
    return bool(value)


def _names(value: object, where: str) -> tuple[str, ...]:
    found = value or []
    if not isinstance(found, list) or not all(isinstance(n, str) and n for n in found):
        raise InputError(f"{where} is {shown(value)}, expected a list of module names")
    return tuple(found)
