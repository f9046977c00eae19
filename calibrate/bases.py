"""Which base an adapter was trained on, by the name in its settings."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from caliport.calibrate.mlx_adapter import is_mlx
from caliport.calibrate.peft_settings import check_lora, read_config
from caliport.core.errors import InputError, printable
from caliport.core.files import ADAPTER_CONFIG
from caliport.core.processes import is_main

# Ends of the names of quantized copies of a base.
_QUANTIZED = ("-unsloth-bnb-4bit", "-bnb-4bit", "-bnb-8bit", "-4bit", "-8bit")
_WAY_ROUND = " (--any-base, or calibration.any_base: true, only compares shapes)"
_GGUF = re.compile(r"([.-](?:i?q\d\w*|b?f16|f32))?\.gguf$")


def check_same_base(directories: Sequence[str | Path]) -> None:
    """Check that adapters name one base: equal last path components, whatever their case.

    Adapters may refer to one base at different paths, so only the last component is compared (for
    a hub cache, models--ORG--NAME/snapshots/HASH, that is NAME), without the end that names a
    quantized copy (``-bnb-4bit``). Adapters that name no base are not compared; nor are revisions
    that are missing or "main", which moves.

    Raises:
        InputError: A directory without a readable ``adapter_config.json``, or two adapters that
            name different bases or different revisions of one.
    """
    first: tuple[str, str, Path] | None = None
    revised: tuple[str, str, Path] | None = None
    for directory in map(Path, directories):
        config = read_config(directory)
        base, revision = _base_of(directory, config), config.get("revision")
        if base is None:
            continue
        name, _ = _base_name(base)
        first = first or (name, base, directory)
        if name != first[0]:
            raise InputError(
                f"{directory / ADAPTER_CONFIG}: base {base}, but {first[2] / ADAPTER_CONFIG} "
                f"has base {first[1]}; expected adapters of one base{_WAY_ROUND}"
            )
        if isinstance(revision, str) and revision not in ("", "main"):
            revised = revised or (revision, base, directory)
            if revision != revised[0]:
                raise InputError(
                    f"{directory / ADAPTER_CONFIG}: base {base} at revision {revision}, but "
                    f"{revised[2] / ADAPTER_CONFIG} has base {revised[1]} at revision "
                    f"{revised[0]}; expected adapters of one base{_WAY_ROUND}"
                )


@cache
def note_base(directory: str | Path, base: str | Path) -> None:
    """Say on stderr, once, that an adapter names another base than the one given.

    It is no error, since a base may be at any path and under any name.

    Raises:
        InputError: The adapter's settings cannot be read.
    """
    named = _base_of(Path(directory), read_config(Path(directory)))
    if named is None or not is_main():
        return
    (name, copy), shown = _base_name(named), printable(named, 200)
    given, other = _base_name(str(Path(base).resolve() if Path(base).exists() else base))
    if name != given:
        what = f"was trained on {shown}, the base given is {base}"
    elif copy and not other:
        what = (
            f"was trained on {shown}, quantized weights of this base; on the base itself its "
            "answers differ slightly from those in training"
        )
    else:
        return
    print(f"caliport: note: {printable(str(directory))} {what}", file=sys.stderr)


def _base_of(directory: Path, config: dict[str, Any]) -> str | None:
    """The base that the settings name; None for none."""
    if is_mlx(config):
        base = config.get("model")
    else:
        check_lora(directory, config)
        base = config.get("base_model_name_or_path")
    return base if isinstance(base, str) and base.strip() else None


def _base_name(base: str) -> tuple[str, bool]:
    """The last part of a path or hub name in lower case, and whether it is a quantized copy."""
    parts = [part for part in base.strip().lower().replace("\\", "/").split("/") if part]
    name = parts[-1] if parts else ""
    if len(parts) > 2 and parts[-2] == "snapshots":
        name = parts[-3].rpartition("--")[2]
    if found := _GGUF.search(name):
        return name[: found.start()], found[1] is not None and "f" not in found[1]
    end = next((end for end in _QUANTIZED if name.endswith(end)), "")
    return name.removesuffix(end), bool(end)
