"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

BaselineOption = Annotated[
    Path | None,
    typer.Option(
        "--baseline",
        metavar="FILE_OR_DIR",
        help="A stored baseline that artifacts are held to as well; see caliport baseline.",
    ),
]
"""Of the commands that validate."""


def with_baseline(overrides: Sequence[str] | None, baseline: Path | None) -> list[str]:
    """A recipe's overrides, and the option ``--baseline`` as one of them."""
    given = [] if baseline is None else [f"validation.baseline={json.dumps(str(baseline))}"]
    return [*(overrides or ()), *given]


DeviceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--device",
        metavar="SERIAL",
        help="Also on this device: a serial, 'any', or what it must be (docs/android.md); "
        "repeatable.",
    ),
]
"""Of the commands that can work on a device too."""


RunnerOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--runner",
        metavar="DIR",
        help="What caliport runner build made; repeatable; default those in build.",
    ),
]


LlamaMainOption = Annotated[
    Path | None,
    typer.Option(
        "--llama-main",
        metavar="FILE",
        help="ExecuTorch's own runner, for .pte files; default build/llama_main.",
    ),
]
