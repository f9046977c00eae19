"""``LowRankUpdate``: what every adapter, merge and calibration is.

Per target module a pair A [R, in] and B [out, R] with the adapter's scaling already inside, so
that the weight update is exactly ΔW = B·A.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from caliport_core.checkpoints import check_safetensors
from caliport_core.errors import InputError

if TYPE_CHECKING:
    from torch import nn

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings under which ΔW is not B·A of the base as published; each is refused by name.
_REFUSED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "fan_in_fan_out",
    "use_qalora",
    "alora_invocation_tokens",
    "layers_to_tie",
)
# Initialisations that also change the base's weights, so that the adapter fits only that base.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True)
class LowRankUpdate:
    """A low-rank update of some linear layers of a base model.

    Attributes:
        a: A by module name, float32 [R, in].
        b: B by module name, float32 [out, R], with the scaling inside. R may differ by module.
    """

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if self.a.keys() != self.b.keys():
            odd = sorted(self.a.keys() ^ self.b.keys())[0]
            raise ValueError(f"{odd}: needs both A and B")
        for name in self.a:
            if self.a[name].shape[0] != self.b[name].shape[1]:
                raise ValueError(
                    f"{name}: A is {tuple(self.a[name].shape)} and B is "
                    f"{tuple(self.b[name].shape)}; expected [R, in] and [out, R]"
                )

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the updated modules in the base model, sorted."""
        return tuple(sorted(self.a))

    def rank(self, name: str) -> int:
        """R of one module."""
        return self.a[name].shape[0]

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of one module."""
        return self.b[name].shape[0], self.a[name].shape[1]

    def delta(self, name: str) -> Tensor:
        """ΔW = B·A of one module, float32 [out, in]."""
        return self.b[name] @ self.a[name]

    @property
    def parameter_count(self) -> int:
        """Number of values in all A and B."""
        return sum(t.numel() for pair in (self.a, self.b) for t in pair.values())

    @classmethod
    def from_peft(cls, directory: str | Path) -> LowRankUpdate:
        """Read a PEFT LoRA directory; the scaling (α/r, or α/√r for rsLoRA) goes into B.

        Raises:
            InputError: The directory or a file is missing, the weights are pickled, truncated or
                not finite, or the adapter uses something whose ΔW is not B·A (DoRA, biases,
                fully trained modules, …), which is refused by name.
        """
        directory = Path(directory)
        config = _read_config(directory)
        weights = directory / _WEIGHTS
        if not weights.is_file():
            pickled = directory / "adapter_model.bin"
            if pickled.is_file():
                raise InputError(
                    f"{pickled}: pickled weights, expected {_WEIGHTS}; pickles are not read"
                )
        check_safetensors(weights)
        try:
            tensors = load_file(weights)
        except SafetensorError as error:
            raise InputError(f"{weights}: not a readable safetensors file ({error})") from None
        a: dict[str, Tensor] = {}
        b: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name, side = _parse_key(key, weights)
            if not torch.isfinite(tensor).all():
                raise InputError(f"{weights}: {key} holds values that are not finite")
            (a if side == "A" else b)[name] = tensor.to(torch.float32)
        if not a:
            raise InputError(
                f"{weights}: no LoRA matrices; expected …lora_A.weight, …lora_B.weight"
            )
        for name in sorted(a.keys() | b.keys()):
            if name not in a or name not in b:
                raise InputError(f"{weights}: {name} has only one of lora_A and lora_B")
            rank, alpha = _rank_and_alpha(config, name)
            if a[name].shape[0] != rank or b[name].shape[1] != rank:
                raise InputError(
                    f"{weights}: {name} has rank {a[name].shape[0]} and {b[name].shape[1]}, "
                    f"{_CONFIG} says {rank}"
                )
            b[name] = b[name] * (alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
        return cls(a, b)

    def to_peft(self, directory: str | Path, base: str | None = None) -> None:
        """Write a PEFT LoRA directory that PEFT loads to the same ΔW (α = r, so scaling 1).

        Args:
            directory: Where to; made if missing.
            base: The base model's directory or hub name, for ``base_model_name_or_path``.
        """
        from peft import LoraConfig

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        ranks = {name: self.rank(name) for name in self.modules}
        most = max(ranks.values())
        odd = {name: rank for name, rank in ranks.items() if rank != most}
        config = LoraConfig(
            r=most,
            lora_alpha=most,
            rank_pattern=dict(odd),
            alpha_pattern=dict(odd),
            target_modules=list(self.modules),
            task_type="CAUSAL_LM",
            inference_mode=True,
            base_model_name_or_path=base,
        )
        config.save_pretrained(str(directory))
        # PEFT 0.21 holds target_modules as a set, so their order in the file would differ by run.
        path = directory / _CONFIG
        content = {**json.loads(path.read_text(encoding="utf-8")), "target_modules": self.modules}
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        tensors = {}
        for name in self.modules:
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = self.a[name].contiguous()
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = self.b[name].contiguous()
        save_file(tensors, directory / _WEIGHTS, metadata={"format": "pt"})

    def check_fits(self, model: nn.Module, source: str | Path) -> None:
        """Check that every module is a linear layer of ``model`` of the right shape.

        Raises:
            InputError: A module that the base does not have, or one of another shape; ``source``
                names the adapter in the message.
        """
        linears = {n: m for n, m in model.named_modules() if hasattr(m, "in_features")}
        for name in self.modules:
            out, into = self.shape(name)
            if name not in linears:
                raise InputError(
                    f"{source}: module {name} is not a linear layer of the base; "
                    "the adapter was made for another base"
                )
            found = (linears[name].out_features, linears[name].in_features)
            if found != (out, into):
                raise InputError(
                    f"{source}: {name} updates a [{out}, {into}] weight, the base has "
                    f"[{found[0]}, {found[1]}]; the adapter was made for another base"
                )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / _CONFIG
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; expected a PEFT LoRA adapter")
    if not path.is_file():
        raise InputError(f"{directory}: no {_CONFIG}; expected a PEFT LoRA adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise InputError(f"{path}: peft_type is {kind}, expected LORA")
    for field in _REFUSED:
        if config.get(field):
            raise InputError(
                f"{path}: {field} = {config[field]!r} is not supported; expected a plain LoRA"
            )
    if config.get("bias", "none") != "none":
        raise InputError(f"{path}: bias = {config['bias']!r} is not supported; expected none")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGES_BASE):
        raise InputError(
            f"{path}: init_lora_weights = {start!r} changes the base's weights; convert the "
            "adapter to a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)"
        )
    for field in ("r", "lora_alpha"):
        if not isinstance(config.get(field), (int, float)) or config[field] <= 0:
            raise InputError(
                f"{path}: {field} is {config.get(field)!r}, expected a positive number"
            )
    return config


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
