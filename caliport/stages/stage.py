"""The rule that a stage whose inputs have not changed is skipped."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from caliport.core.directories import content_hash, key, up_to_date
from caliport.core.outputs import check_output, new_directory
from caliport.core.processes import is_main, wait_until
from caliport.core.progress import console

Build = Callable[[Path, dict[str, Any], Path], None]
"""Fills a directory, adds manifest entries, and may keep a checkpoint in the file named last."""

_UNTIMED = ("export",)  # the same inputs give the same bytes, so there are no times in artifacts


def stage(
    out: Path,
    name: str,
    title: str,
    inputs: Mapping[str, Path | str],
    settings: Mapping[str, Any],
    build: Build,
    together: bool = False,
) -> None:
    """Make ``out`` by ``build``, unless it is there already, made from the same inputs.

    Args:
        out: The directory.
        name: The stage, for the manifest.
        title: What to tell the user.
        inputs: Files and directories that ``build`` reads.
        settings: All else that decides the result; dataclasses and models are allowed.
        build: Fills the directory. Its checkpoint file survives a kill and belongs to these
            inputs alone.
        together: ``build`` trains with all processes. Otherwise only the main one builds and the
            others wait; either way only the main one writes.
    """
    check_output(out, name, inputs.values())
    hashes = hashes_of(inputs)
    plain = {label: _plain(value) for label, value in settings.items()}
    stage_key = key(name, hashes, plain)
    if up_to_date(out, stage_key):
        console.print(f"[dim]{title}: up to date, skipped[/dim]")
        return
    resume = out.parent / f".{out.name}.resume-{stage_key[:16]}"
    if not is_main():
        if together:
            with TemporaryDirectory() as unused:
                build(Path(unused), {}, resume)
        wait_until(lambda: up_to_date(out, stage_key))
        _hash.cache_clear()
        return
    start = time.monotonic()
    with new_directory(out, name, hashes, plain) as (partial, extra):
        build(partial, extra, resume)
        if name not in _UNTIMED:
            extra["seconds"] = round(time.monotonic() - start, 3)
    for left in out.parent.glob(f".{out.name}.resume-*"):
        left.unlink()
    _hash.cache_clear()
    console.print(f"{title}: done")


def hashes_of(inputs: Mapping[str, Path | str]) -> dict[str, str]:
    """Content hash of each input, by its label; each path is read once until a stage is made."""
    return {label: _hash(str(path)) for label, path in inputs.items()}


@lru_cache(maxsize=256)
def _hash(path: str) -> str:
    """Content hash, once a process for each path; a hub name stands for itself."""
    return content_hash(Path(path)) if os.path.exists(path) else f"name:{path}"


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value
