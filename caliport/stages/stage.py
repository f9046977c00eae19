"""Run a stage, or skip it if its inputs have not changed."""

from __future__ import annotations

import glob
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

from rich.text import Text

from caliport.core.directories import (
    MANIFEST,
    check_files,
    key,
    read_manifest,
    up_to_date,
)
from caliport.core.errors import InputError
from caliport.core.model_files.base_files import check_base_files, local
from caliport.core.model_files.chat_templates import template_pins
from caliport.core.model_files.inputs import input_hash
from caliport.core.model_files.tokenizers import check_tokenizer_files
from caliport.core.outputs import check_output, new_directory
from caliport.core.processes import alone, is_main, wait_until
from caliport.core.progress import console
from caliport.export.quantization.text import INTEGERS_KEY

Build = Callable[[Path, dict[str, Any], Path], None]
"""Takes a directory to fill, a dict for manifest entries, and a path for a checkpoint, which may be
a file or a directory."""

_UNTIMED = ("export",)  # artifacts are reproducible byte by byte, so they record no times


def stage(
    out: Path,
    name: str,
    title: str,
    inputs: Mapping[str, Path | str],
    settings: Mapping[str, Any],
    build: Build,
    together: bool = False,
) -> None:
    """Make ``out`` with ``build``, unless it is there, whole and made from the same inputs.

    Args:
        out: The directory to write.
        name: Name of the stage, for the manifest.
        title: Name of the work, shown to the user.
        inputs: Files and directories that ``build`` reads.
        settings: Everything else that determines the result; may contain dataclasses and pydantic
            models.
        build: Fills the directory. Its checkpoint survives a kill and is only reused for the
            same inputs and settings.
        together: ``build`` trains with all processes. Otherwise only the main process builds and
            the others wait; in both cases only the main process writes.

    Raises:
        InputError: An output that cannot be written, or a ``base`` with files that no stage reads.
    """
    check_output(out, name, inputs.values())
    if "base" in inputs:
        check_base_files(inputs["base"])
    hashes = hashes_of(inputs)
    plain = {label: _plain(value) for label, value in settings.items()}
    if (base := local(inputs["base"]) if "base" in inputs else None) is not None:
        plain |= {"chat": pins} if (pins := template_pins(base)) else {}
    stage_key = key(name, hashes, plain)
    if up_to_date(out, stage_key):
        console.print(Text(f"{title}: up to date, skipped", "dim"))
        return
    _say_damage(out, stage_key, title)
    resume = out.parent / f".{out.name}.resume-{stage_key[:16]}"
    if not is_main():
        if together:
            with TemporaryDirectory() as unused:
                build(Path(unused), {}, resume)
        wait_until(lambda: up_to_date(out, stage_key))
        return
    start = time.monotonic()
    with alone(out):
        with new_directory(out, name, hashes, plain) as (partial, extra):
            build(partial, extra, resume)
            if name not in _UNTIMED:
                extra["seconds"] = round(time.monotonic() - start, 3)
        for left in out.parent.glob(f".{glob.escape(out.name)}.resume-*"):
            if (left / INTEGERS_KEY).is_file():
                rmtree(left)
            elif not left.is_dir():
                left.unlink()
    console.print(f"{title}: done")


def _say_damage(out: Path, stage_key: str, title: str) -> None:
    """Say why a directory that was made from the same inputs is made again."""
    if (out / MANIFEST).is_file():
        try:
            if read_manifest(out).get("key") == stage_key:
                check_files(out)
        except InputError as error:
            console.print(Text(f"{title}: is made again ({error})", "yellow"), soft_wrap=True)


def hashes_of(inputs: Mapping[str, Path | str]) -> dict[str, str]:
    """Content hash of each input, by its label; a hub name stands for itself.

    Raises:
        InputError: A file of the base's tokenizer that is too large to be one, before all is read.
    """
    if (base := local(inputs["base"]) if "base" in inputs else None) is not None:
        check_tokenizer_files(base)
    return {label: input_hash(path) for label, path in inputs.items()}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value
