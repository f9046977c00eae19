"""Gains of normalization layers, tuned so that an int4 decoder answers like the float one.

Norm tweaking (https://arxiv.org/abs/2309.02784), here end to end: the integers stay, and the gains,
which ship in float32 whatever the precision, are trained to minimise the Kullback-Leibler
divergence of the next-token distributions on the calibration text. Size and kernels stay the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from caliport.core.errors import InputError
from caliport.core.places import replacing
from caliport.core.progress import at
from caliport.export.calibrated.integers import TUNING
from caliport.export.quantization.choices import NORMS, Quantization
from caliport.export.quantization.tensors import KnownIntegers, as_shipped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RATE = 1e-3
_BETAS = (0.9, 0.99)
_WARM_UP = 5
_FACTS = "tuned"  # one entry, since a file keeps several in no fixed order
_EVERY = 8  # steps between two states that a killed run goes on from


def gains_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The gains of a decoder's normalization layers, by parameter name."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear | nn.Embedding)
        and isinstance(getattr(module, "weight", None), nn.Parameter)
        and module.weight.dim() == 1
    }


def tune_norms(
    model: PreTrainedModel,
    how: Quantization,
    texts: Sequence[Sequence[int]],
    known: KnownIntegers,
    place: Path,
) -> None:
    """Tune the gains of a decoder that ships with known integers; they are written to ``place``.

    Each text is one step, in order, and all are passed once.

    Args:
        model: The float32 decoder, with its adapter folded in; not changed.
        how: How it ships.
        texts: Token ids of the calibration text.
        known: The integers.
        place: Their directory. A killed run goes on there.

    Raises:
        InputError: The loss is not finite.
    """
    # What gains depend on besides what the integers of their directory do.
    state, key = place / TUNING, json.dumps([sorted(how.int8_layers), how.embedding_bits])
    if _steps(place / NORMS, key) == len(texts):
        return
    student = as_shipped(model, how, known=known).requires_grad_(False)
    gains = gains_of(student)
    for gain in gains.values():
        gain.requires_grad_(True)
    optimizer = torch.optim.Adam(gains.values(), lr=_RATE, betas=_BETAS)
    done = _resume(state, key, gains, optimizer)
    for step in range(done, len(texts)):
        at("tuning the gains of normalizations", step, len(texts))
        rise = min(1.0, (step + 1) / _WARM_UP)
        fall = 0.5 * (1 + math.cos(math.pi * step / len(texts)))
        optimizer.param_groups[0]["lr"] = _RATE * rise * fall
        ids = torch.tensor([list(texts[step])])
        with torch.no_grad():
            wanted = model(ids, use_cache=False).logits[0].log_softmax(-1)
        found = student(ids, use_cache=False).logits[0].log_softmax(-1)
        loss = nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
        if not loss.isfinite():
            raise InputError("tuning the gains of normalizations: the loss is not finite")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % _EVERY == 0:
            _write(state, _state_of(gains, optimizer), step + 1, key)
    tuned = {name: gain.detach() for name, gain in gains.items()}
    _write(place / NORMS, tuned, len(texts), key)
    state.unlink(missing_ok=True)


def _state_of(
    gains: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    found = {f"{name} value": gain.detach() for name, gain in gains.items()}
    for name, gain in gains.items():
        for key, value in optimizer.state[gain].items():
            found[f"{name} {key}"] = value
    return found


def _steps(place: Path, key: str) -> int:
    """The steps that a file's gains were tuned for; 0 if it is not there or has another key."""
    from safetensors import safe_open

    if not place.is_file():
        return 0
    with safe_open(place, framework="pt") as opened:
        found, steps = json.loads(opened.metadata()[_FACTS])
    return int(steps) if found == key else 0


def _resume(
    place: Path,
    key: str,
    gains: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Take up what a killed run left; the number of steps it had done."""
    from safetensors import safe_open

    steps = _steps(place, key)
    if not steps:
        return 0
    with safe_open(place, framework="pt") as opened, torch.no_grad():
        for name, gain in gains.items():
            gain.copy_(opened.get_tensor(f"{name} value"))
            for part in ("step", "exp_avg", "exp_avg_sq"):
                optimizer.state[gain][part] = opened.get_tensor(f"{name} {part}")
    return steps


def _write(place: Path, tensors: dict[str, Tensor], steps: int, key: str) -> None:
    from safetensors.torch import save_file

    with replacing(place) as beside:
        save_file(tensors, beside, metadata={_FACTS: json.dumps([key, steps])})
