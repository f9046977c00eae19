"""Output directories that appear complete or not at all and never replace other tools' files.

A stage writes into a temporary sibling of its output and renames it when done.
"""

from __future__ import annotations

import errno
import glob
import itertools
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from rich.text import Text

from caliport.core.directories import (
    MANIFEST,
    file_hash,
    files_in,
    key,
    read_manifest,
    versions,
    vouch,
)
from caliport.core.errors import InputError, system_error, unusable
from caliport.core.places import FORCED, check_place, check_writable
from caliport.core.processes import alone, is_main
from caliport.core.progress import console

_RUN: ContextVar[Path | None] = ContextVar("run", default=None)
_LOW_SPACE = 1 << 20
_OURS = {"stage", "key", "files"}  # fields of every caliport manifest


@contextmanager
def forced(force: bool = True) -> Iterator[None]:
    """While the body runs, an output may replace a directory that caliport did not make."""
    token = FORCED.set(force)
    try:
        yield
    finally:
        FORCED.reset(token)


@contextmanager
def within_run(root: Path) -> Iterator[None]:
    """While the body runs, what no longer is an output in a run's directory is set aside.

    A directory whose manifest is lost is kept under another name, so that the run can make it.
    """
    token = _RUN.set(root.resolve())
    try:
        yield
    finally:
        _RUN.reset(token)


def check_output(out: Path, stage: str, inputs: Iterable[Path | str] = ()) -> None:
    """Check, before any work, that a directory can be written without losing anything.

    Allowed are new and empty directories, and directories that the same stage made and that have no
    other files. ``forced`` allows any other directory too, but never an input or a parent of one.

    Args:
        out: The directory to create or replace.
        stage: Name of the stage that writes it, as in manifests.
        inputs: Inputs of the stage; hub names are ignored.

    Raises:
        InputError: ``out`` is a file, a link, a mount point, the current directory or a parent of
            it, is an input or inside or around one, or has files that this stage did not make.
    """
    check_place(out, "a new directory")
    place = out.resolve()
    if os.path.ismount(place):
        raise InputError(f"{out}: is a mount point, expected a directory below it")
    here = Path.cwd()
    if place == here or place in here.parents:
        whose = "is" if place == here else "contains"
        raise InputError(f"{out}: {whose} the current directory, expected a new directory")
    for path in inputs:
        given = Path(path)
        if given.exists():
            _check_apart(out, place, given)
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out}: is a file, expected a new directory")
    if not FORCED.get():
        _check_ours(out, stage)


def _check_apart(out: Path, place: Path, given: Path) -> None:
    source = given.resolve()
    if place == source:
        raise InputError(f"{out}: is an input, expected a new directory")
    if place in source.parents:
        raise InputError(f"{out}: contains the input {given}, expected a new directory")
    if source in place.parents:
        raise InputError(f"{out}: is inside the input {given}, expected a directory elsewhere")


def _check_ours(out: Path, stage: str) -> None:
    found = sorted(path for path in out.rglob("*") if not path.is_dir() or path.is_symlink())
    if not found and not any(out.iterdir()):
        return
    manifest = _manifest(out)
    if not manifest.keys() >= _OURS or not isinstance(manifest["files"], dict):
        run = _RUN.get()
        if run is not None and run in out.resolve().parents:
            if is_main():
                _set_aside(out)
            return
        raise InputError(
            f"{out}: is not empty and was not made by caliport; name a new directory, or replace "
            "all of it with --force"
        )
    for path in found:
        name = path.relative_to(out).as_posix()
        if name != MANIFEST and name not in manifest["files"]:
            raise InputError(
                f"{path}: was not made by caliport and would be lost; move it elsewhere, or "
                "replace all of the directory with --force"
            )
    if manifest["stage"] != stage:
        raise InputError(
            f"{out}: was made by the stage {manifest['stage']!r}, this is {stage!r}; name a new "
            "directory, or replace it with --force"
        )


def _set_aside(out: Path) -> None:
    names = (out.with_name(f"{out.name}.kept-{number}") for number in itertools.count(1))
    kept = next(path for path in names if not os.path.lexists(path))
    out.rename(kept)
    reason = f"{out}: no manifest of caliport's; it is made again, what was there is {kept}"
    console.print(Text(reason, "yellow"), soft_wrap=True)


def _manifest(out: Path) -> dict[str, Any]:
    try:
        return read_manifest(out)
    except InputError:
        return {}


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
        InputError: ``out`` may not be replaced (``check_output``), another process is writing it,
            or it cannot be written (permissions, no space left); no partial output remains.
    """
    check_output(out, stage)
    check_writable(out)
    with alone(out), _partial(out, stage, inputs, settings) as made:
        yield made


@contextmanager
def _partial(
    out: Path, stage: str, inputs: Mapping[str, str], settings: Mapping[str, Any]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    partial = out.parent / f".{out.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    extra: dict[str, Any] = {}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        partial.mkdir()
        yield partial, extra
        files = {
            name: {"bytes": entry.stat().st_size, "sha256": file_hash(entry)}
            for name, entry in files_in(partial).items()
        }
        manifest = {
            "stage": stage,
            "key": key(stage, inputs, settings),
            "inputs": dict(inputs),
            "settings": dict(settings),
            "versions": versions(),
            **extra,
            "files": files,
        }
        vouch(str(facts["sha256"]) for facts in files.values())
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _replace(partial, out)
    except InputError:
        raise
    except Exception as error:
        problem = _problem(error, out, partial)
        if problem is None:
            raise
        raise InputError(problem) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _problem(error: Exception, out: Path, partial: Path) -> str | None:
    """The message for an error of the system; None of another one, where the disk has room."""
    known, name = system_error(error), getattr(error, "filename", None)
    if known is not None and isinstance(name, str) and not _is_of(Path(name), out, partial):
        return unusable(error)
    place = next((p for p in (out, *out.parents) if p.exists()), Path("."))
    if known is None and shutil.disk_usage(place).free < _LOW_SPACE:
        known = errno.ENOSPC
    if known is None:
        return None
    return f"{out}: cannot be written: {os.strerror(known)}; name a writable place"


def _is_of(path: Path, out: Path, partial: Path) -> bool:
    """Whether an output could not be made because of this file or directory."""
    return path.is_relative_to(partial) or out.is_relative_to(path)


def _replace(new: Path, out: Path) -> None:
    """Move ``new`` to ``out``. Between the two renames ``out`` is missing, but never partial."""
    if out.exists():
        old = out.parent / f".{out.name}.old-{os.getpid()}-{secrets.token_hex(4)}"
        out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.rename(out)


def _remove_abandoned(out: Path) -> None:
    """Remove what killed processes left beside ``out``; running processes keep theirs."""
    for kind in ("partial", "old"):
        for left in out.parent.glob(f".{glob.escape(out.name)}.{kind}-*"):
            pid = left.name.removeprefix(f".{out.name}.{kind}-").partition("-")[0]
            if not (pid.isdigit() and Path(f"/proc/{pid}").exists()) or pid == str(os.getpid()):
                shutil.rmtree(left, ignore_errors=True)
