"""Output directories that appear complete or not at all, and their ``manifest.json``.

A stage writes into a temporary sibling of its output and renames it when done. ``manifest.json``
records a key of everything the directory was made from, so a stage whose inputs have not changed
can be skipped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from caliport.core.errors import InputError
from caliport.core.files import file_hash
from caliport.core.untrusted import check_regular, read_object, shown

MANIFEST = "manifest.json"
_MANIFEST_BYTES = 64 * 2**20  # one of a training has a loss for each step
_MADE: set[str] = set()
_PACKAGES = (
    "caliport",
    "torch",
    "torchao",
    "transformers",
    "peft",
    "executorch",
    "onnx",
    "onnxruntime",
    "onnxruntime-genai",
)


def versions() -> dict[str, str]:
    """Installed versions of the packages that can change what a stage writes."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of a directory's file names and bytes.

    Manifests and hidden files are ignored, so a directory's hash depends on what a later stage
    reads and not on when it was made.
    """
    if path.is_file():
        return file_hash(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such file or directory")
    digest = hashlib.sha256()
    for name, entry in files_in(path).items():
        digest.update(f"{name}\0{file_hash(entry)}\n".encode())
    return digest.hexdigest()


def files_in(directory: Path) -> dict[str, Path]:
    """Files below a directory by relative name; the manifest and hidden ones are left out."""
    entries = (entry for entry in sorted(directory.rglob("*")) if entry.is_file())
    named = {entry.relative_to(directory).as_posix(): entry for entry in entries}
    return {
        name: entry
        for name, entry in named.items()
        if name != MANIFEST and not any(part.startswith(".") for part in name.split("/"))
    }


def key(stage: str, inputs: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """Hash of everything that determines a stage's output: inputs, settings and versions."""
    text = json.dumps([stage, dict(inputs), dict(settings), versions()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read a directory's manifest; ``InputError`` if it is missing or not a JSON object."""
    path = directory / MANIFEST
    if not path.exists():
        raise InputError(f"{directory}: no {MANIFEST}; expected a directory made by caliport")
    return read_object(path, _MANIFEST_BYTES, directory)


def check_files(directory: Path) -> None:
    """Check that a finished directory holds exactly the files that its manifest records.

    Hidden files are ignored, and so is the manifest, since no hash of it is recorded.

    Args:
        directory: The finished directory.

    Raises:
        InputError: The first file that is missing, changed, not recorded, or not a regular file of
            the directory.
    """
    again = "the directory is not what was made; make or fetch it again"
    recorded = read_manifest(directory).get("files")
    if not isinstance(recorded, dict) or not recorded:
        raise InputError(f"{directory / MANIFEST}: no `files`, expected each file's size and hash")
    found = files_in(directory)
    for name, facts in recorded.items():
        if not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys():
            raise InputError(
                f"{directory / MANIFEST}: files.{name[:200]}: expected `bytes` and `sha256`"
            )
        path = directory / name
        if name not in found:
            raise InputError(f"{path}: no such file, but {MANIFEST} records it; {again}")
        size = check_regular(path, root=directory)
        if size != facts["bytes"]:
            raise InputError(
                f"{path}: {size} bytes, {MANIFEST} records {shown(facts['bytes'])}; {again}"
            )
        digest = file_hash(path)
        if digest != facts["sha256"]:
            raise InputError(
                f"{path}: SHA-256 {digest[:12]}…, {MANIFEST} records "
                f"{str(facts['sha256'])[:12]}…; {again}"
            )
    for name in found:
        if name not in recorded:
            raise InputError(
                f"{directory / name}: not recorded in {MANIFEST}; runtimes read some files by "
                "their name alone, so move it elsewhere"
            )


def check_recorded(directory: Path) -> None:
    """Run ``check_files`` if there is a manifest; without one there is nothing to check."""
    if (directory / MANIFEST).is_file():
        check_files(directory)


def up_to_date(directory: Path, stage_key: str) -> bool:
    """Whether a finished directory made from the same inputs is there with all of its files."""
    if not (directory / MANIFEST).is_file():
        return False
    try:
        if read_manifest(directory).get("key") != stage_key:
            return False
        check_files(directory)
    except InputError:
        return False
    return True


def vouch(digests: Iterable[str]) -> None:
    """Remember the hashes of files that this process made itself; see ``made_here``."""
    _MADE.update(digests)


def made_here(path: Path) -> bool:
    """Whether this process itself made a file with this content, so that it is no stranger's."""
    return file_hash(path) in _MADE
