"""Random adapters and compositions in the form that Learnable Calibration publishes.

Nine single-task LoRAs of rank 32 with α = 16 on q, k, v, o, gate, up and down, and fourteen
compositions of two of them: the LC++ correction of rank 4, one for all layers, added to their
linear merge, and the same correction without the merge (arXiv 2507.16083, Eq. 5 and 7 and the
ablation without LoRAs). Only the numbers are random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from caliport.calibrate.corrections.common import Composition, corrected_update
from caliport.calibrate.corrections.lc_plus_plus import LCPlusPlus
from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.merges.common import rank_zero
from caliport.calibrate.merges.linear import linear
from caliport.calibrate.peft_files import read_peft, write_peft
from caliport.core.checkpoints import load_config
from caliport.core.directories import content_hash
from caliport.core.outputs import new_directory
from caliport.data.pocket import LANGUAGES, TONES
from caliport.export.decoder.skeleton import empty

RANK, ALPHA = 32, 16
MAINS = ("summarize", "reply")
AUXILIARIES = (*LANGUAGES, *TONES)
ADAPTERS = (*MAINS, *AUXILIARIES)
COMPOSITIONS = {f"{main}_{form}": (main, form) for main in MAINS for form in AUXILIARIES}
FAMILIES = ("merged", "alone")
_STD = 0.05  # for B; with α/r = 1/2, ΔW is about a tenth of weights with std 0.02


def write_adapters(checkpoint: Path, out: Path, compositions: Sequence[str], seed: int = 0) -> None:
    """Write ``out/adapters/NAME`` and ``out/FAMILY/NAME``, PEFT LoRA directories.

    At most three adapters are in memory. ``out`` appears complete or not at all.

    Args:
        checkpoint: The base.
        out: The directory to write.
        compositions: Names in ``COMPOSITIONS``; only the adapters that they need are written.
        seed: Random seed.
    """
    settings = {"compositions": list(compositions), "seed": seed, "rank": RANK, "alpha": ALPHA}
    with new_directory(out, "adapters", {"base": content_hash(checkpoint)}, settings) as (part, _):
        shapes = linear_shapes(empty(load_config(checkpoint)[0]))
        for index, name in enumerate(needed(compositions)):
            made = _random(shapes, seed * 1000 + index)
            write_peft(made, part / "adapters" / name, str(checkpoint))
        for index, name in enumerate(compositions):
            updates = {task: read_peft(part / "adapters" / task) for task in COMPOSITIONS[name]}
            for family, merge in zip(FAMILIES, (linear, rank_zero), strict=True):
                composition = Composition(updates, merge(list(updates.values())))
                corrected = _corrected(composition, seed * 1000 + 500 + index)
                write_peft(corrected, part / family / name, str(checkpoint))


def needed(compositions: Sequence[str]) -> list[str]:
    """The adapters that the given compositions are made of."""
    used = {task for name in compositions for task in COMPOSITIONS[name]}
    return [name for name in ADAPTERS if name in used]


def linear_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer except the head."""
    head = model.get_output_embeddings()
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def _random(shapes: Mapping[str, tuple[int, int]], seed: int) -> LowRankUpdate:
    """A LoRA with A initialized as in PEFT and B normal, with α/r inside B."""
    draw = torch.Generator().manual_seed(seed)
    a, b = {}, {}
    for name, (rows, width) in shapes.items():
        a[name] = torch.empty(RANK, width).uniform_(-(width**-0.5), width**-0.5, generator=draw)
        b[name] = torch.empty(rows, RANK).normal_(0.0, _STD * ALPHA / RANK, generator=draw)
    return LowRankUpdate(a, b)


def _corrected(composition: Composition, seed: int) -> LowRankUpdate:
    """The composition with an LC++ correction; its P2, which training starts at 0, is random."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        correction = LCPlusPlus({"it": composition})
        for value in correction.p2.values():
            value.normal_(0.0, _STD)
    return corrected_update(correction, "it", composition)
