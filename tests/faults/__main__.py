"""Print the table of ``docs/validation.md``: ``python -m tests.faults``."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tests.faults.checking import check, failed
from tests.faults.making import EXPORT
from tests.faults.scene import Scene
from tests.faults.table import FAULTS


def main() -> None:
    """Make and check every faulty artifact; a row each, with the first gate and the stage."""
    torch.set_num_threads(1)
    runtimes = sorted(EXPORT)
    print("| fault | breaks | precision | " + " | ".join(runtimes) + " |", flush=True)
    print("|---" * (3 + len(runtimes)) + "|")
    with TemporaryDirectory() as place:
        root = Path(place)
        scene = Scene.build(root)
        for number, fault in enumerate(FAULTS):
            cells = [fault.name, fault.stage, fault.precision]
            for runtime in runtimes:
                result = check(scene, runtime, root / f"{runtime}-{number}", fault)
                gates = failed(result)
                found = f"{gates[0]} ({len(gates)})" if gates else "**missed**"
                right = "" if result.lost_at == fault.stage else f", named {result.lost_at}"
                cells.append(found + right)
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
