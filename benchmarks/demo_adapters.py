"""Put the demo's adapters into recipes/demo, in bfloat16: half the size in the repository.

caliport calibrate recipes/demo-adapters.yaml
python -m benchmarks.demo_adapters
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from caliport.core.directories import read_manifest
from caliport.core.outputs import new_directory

TRAINED = Path("runs/demo-adapters/adapters")
PLACE = Path(__file__).parents[1] / "recipes/demo"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def put(trained: Path, out: Path) -> None:
    """Write a trained adapter with its prompt, and without its training curve.

    Args:
        trained: A directory that ``caliport calibrate`` made of a task.
        out: Where to; an adapter that is there is replaced.
    """
    made = read_manifest(trained)
    with new_directory(out, made["stage"], made["inputs"], made["settings"]) as (partial, extra):
        extra["prompt"] = made["prompt"]
        shutil.copyfile(trained / _CONFIG, partial / _CONFIG)
        tensors = load_file(trained / _WEIGHTS)
        narrow = {name: value.to(torch.bfloat16) for name, value in tensors.items()}
        save_file(narrow, partial / _WEIGHTS, metadata={"format": "pt"})


if __name__ == "__main__":
    for adapter in sorted(TRAINED.iterdir()):
        put(adapter, PLACE / adapter.name)
