"""Output directories that appear complete or not at all, and their ``manifest.json``.

A stage writes into a temporary sibling of its output and renames it when done. ``manifest.json``
records a key of everything the directory was made from, so a stage whose inputs have not changed
can be skipped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from caliport.core.errors import InputError

MANIFEST = "manifest.json"
_UNWRITABLE = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.ENOTDIR}
_LOW_SPACE = 1 << 20
_SETTLED = 100_000_000  # nanoseconds; longer than one tick of a file system's clock
_HASHES: dict[tuple[int, ...], str] = {}
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


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal, read in chunks.

    Hashes are cached per process by inode, size and times, so a file that was only renamed with
    its directory is not read again.
    """
    found = path.stat()
    state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    if state in _HASHES:
        return _HASHES[state]
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if time.time_ns() - found.st_ctime_ns > _SETTLED:  # else it may change within the same tick
        _HASHES[state] = digest
    return digest


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
    for name, entry in _files(path).items():
        digest.update(f"{name}\0{file_hash(entry)}\n".encode())
    return digest.hexdigest()


def _files(directory: Path) -> dict[str, Path]:
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
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{directory}: no {MANIFEST}; expected a directory made by caliport"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(manifest, dict):
        raise InputError(f"{path}: found {type(manifest).__name__}, expected a JSON object")
    return manifest


def check_files(directory: Path) -> None:
    """Check that a finished directory holds exactly the files that its manifest records.

    Hidden files are ignored, and so is the manifest, since no hash of it is recorded.

    Raises:
        InputError: The first file that is missing, changed or not recorded.
    """
    again = "the directory is not what was made; make or fetch it again"
    recorded = read_manifest(directory).get("files")
    if not isinstance(recorded, dict) or not recorded:
        raise InputError(f"{directory / MANIFEST}: no `files`, expected each file's size and hash")
    found = _files(directory)
    for name, facts in recorded.items():
        if not isinstance(facts, dict) or not {"bytes", "sha256"} <= facts.keys():
            raise InputError(f"{directory / MANIFEST}: files.{name}: expected `bytes` and `sha256`")
        path = directory / name
        if name not in found:
            raise InputError(f"{path}: no such file, but {MANIFEST} records it; {again}")
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise InputError(f"{path}: {size} bytes, {MANIFEST} records {facts['bytes']}; {again}")
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
    """Whether a finished directory made from the same inputs already exists."""
    if not (directory / MANIFEST).is_file():
        return False
    try:
        return read_manifest(directory).get("key") == stage_key
    except InputError:
        return False


@contextmanager
def new_directory(
    out: Path, stage: str, inputs: Mapping[str, str], settings: Mapping[str, Any]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a directory to fill and a dict for extra manifest entries; then rename it to ``out``.

    Args:
        out: The output directory. An existing one is replaced once the new one is complete.
        stage: Name of the stage, for the manifest.
        inputs: Content hash of every input, by name.
        settings: JSON-serializable settings.

    Raises:
        InputError: ``out`` cannot be written (permissions, no space left); no partial output
            remains.
    """
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    extra: dict[str, Any] = {}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        partial.mkdir()
        yield partial, extra
        manifest = {
            "stage": stage,
            "key": key(stage, inputs, settings),
            "inputs": dict(inputs),
            "settings": dict(settings),
            "versions": versions(),
            **extra,
            "files": {
                name: {"bytes": entry.stat().st_size, "sha256": file_hash(entry)}
                for name, entry in _files(partial).items()
            },
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _replace(partial, out)
    except InputError:
        raise
    except Exception as error:
        problem = _write_problem(error, out)
        if problem is None:
            raise
        raise InputError(f"{out}: cannot be written: {problem}; name a writable place") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_problem(error: Exception, out: Path) -> str | None:
    """Why ``out`` cannot be written, or None; libraries wrap a full disk in their own errors."""
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return os.strerror(error.errno or 0)
    place = next((p for p in (out, *out.parents) if p.exists()), Path("."))
    if "No space left" in str(error) or shutil.disk_usage(place).free < _LOW_SPACE:
        return os.strerror(errno.ENOSPC)
    return None


def _replace(new: Path, out: Path) -> None:
    """Move ``new`` to ``out``. Between the two renames ``out`` is missing, but never partial."""
    if out.exists():
        old = out.parent / f".{out.name}.old-{os.getpid()}"
        out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.rename(out)


def _remove_abandoned(out: Path) -> None:
    """Remove what killed processes left beside ``out``; running processes keep theirs."""
    for kind in ("partial", "old"):
        for left in out.parent.glob(f".{out.name}.{kind}-*"):
            pid = left.name.rpartition("-")[2]
            if not (pid.isdigit() and Path(f"/proc/{pid}").exists()) or pid == str(os.getpid()):
                shutil.rmtree(left, ignore_errors=True)
