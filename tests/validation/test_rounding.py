"""The noise that stands for rounding: its size, and that it is undone and the same again."""

from __future__ import annotations

import torch
from torch import nn

from caliport.validation.gates import rounding


def _heard(width: int, seed: int) -> torch.Tensor:
    """What a layer hears of ones [3, width] while it is jittered."""
    layer, heard = nn.Linear(width, 1), []
    with rounding.jittered(layer, seed):
        layer.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
        layer(torch.ones(3, width))
    layer(torch.ones(3, width))
    assert torch.equal(heard[1], torch.ones(3, width)), "undone afterwards"
    return heard[0]


def test_inputs_are_off_by_about_four_roundings_and_the_same_again() -> None:
    found = _heard(4096, 1) - 1
    assert 3 * 2.0**-24 < found.std() < 5 * 2.0**-24
    assert abs(found.mean()) < 2.0**-24 / 4
    assert torch.equal(_heard(4096, 1) - 1, found)
    assert not torch.equal(_heard(4096, 2) - 1, found)


def test_more_values_than_were_drawn() -> None:
    wide = rounding._BANK // 2  # of three rows
    assert (_heard(wide, 1) != 1).float().mean() > 0.7
