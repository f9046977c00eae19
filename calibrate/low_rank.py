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
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from caliport.calibrate.peft_files import (
    _CONFIG,
    _PREFIX,
    _WEIGHTS,
    _parse_key,
    _rank_and_alpha,
    _read_config,
    _read_tensors,
)
from caliport.core.errors import InputError

if TYPE_CHECKING:
    from torch import nn


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
                not finite, or the adapter uses something whose effect is not B·A on linear
                layers (DoRA, biases, fully trained modules, LoRA on embeddings, …) or that is not
                known here; it is refused by name, with the reason.
        """
        directory = Path(directory)
        config = _read_config(directory)
        weights = directory / _WEIGHTS
        a: dict[str, Tensor] = {}
        b: dict[str, Tensor] = {}
        for key, tensor in _read_tensors(directory).items():
            name, side = _parse_key(key, weights)
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

        PEFT knows no rank 0: a module of rank 0 is written as rank 1 with A = 0 and B = 0.

        Args:
            directory: Where to; made if missing.
            base: The base model's directory or hub name, for ``base_model_name_or_path``.
        """
        from peft import LoraConfig

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        ranks = {name: max(self.rank(name), 1) for name in self.modules}
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
            a, b = self.a[name], self.b[name]
            if self.rank(name) == 0:
                a, b = a.new_zeros(1, a.shape[1]), b.new_zeros(b.shape[0], 1)
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.contiguous()
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.contiguous()
        save_file(tensors, directory / _WEIGHTS, metadata={"format": "pt"})

    def check_fits(self, model: nn.Module, source: str | Path) -> None:
        """Check that every module is a linear layer of ``model`` of the right shape.

        Raises:
            InputError: A module that the base does not have, or one of another shape; ``source``
                names the adapter in the message.
        """
        shapes = {name: _linear_shape(module) for name, module in model.named_modules()}
        for name in self.modules:
            out, into = self.shape(name)
            found = shapes.get(name)
            if found is None:
                raise InputError(
                    f"{source}: module {name} is not a linear layer of the base; "
                    "the adapter was made for another base"
                )
            if found != (out, into):
                raise InputError(
                    f"{source}: {name} updates a [{out}, {into}] weight, the base has "
                    f"[{found[0]}, {found[1]}]; the adapter was made for another base"
                )


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer or of transformers' Conv1D (GPT-2), None of others."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return cast(int, module.out_features), cast(int, module.in_features)
    if hasattr(module, "nf") and hasattr(module, "nx"):
        return cast(int, module.nf), cast(int, module.nx)
    return None
