"""The export stage: make one artifact, unless it is up to date."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from caliport.core.directories import MANIFEST
from caliport.core.model_files.base_files import check_base_files
from caliport.core.outputs import check_output
from caliport.core.progress import working
from caliport.export import runtime as runtimes
from caliport.export.calibrated.requests import check_text
from caliport.export.request import Request
from caliport.stages.stage import hashes_of, stage


def export_to(
    out: Path,
    title: str,
    request: Request,
    *,
    refuse: bool = True,
    integers: Path | None = None,
) -> None:
    """Export one artifact, unless it is up to date, and print its needs before.

    Args:
        out: The artifact directory.
        title: Name of the work, shown to the user.
        request: What to export.
        refuse: Raise an error if memory or disk is too small.
        integers: Where calibrated integers are kept, for other exports of the same weights;
            default beside ``out`` until it is made.

    Raises:
        InputError: See ``caliport.export``; too little memory or disk.
    """
    runtimes.get(request.runtime).check(request)
    check_text(request)
    check_output(out, "export", request.inputs().values())
    check_base_files(request.base)
    # Print the needs before any work, unless the export may be skipped.
    may_be_skipped = (out / MANIFEST).is_file()
    if not may_be_skipped:
        hashing = Thread(target=_hash_ahead, args=(request.inputs(),), daemon=True)
        hashing.start()
        _say_needs(request, out, refuse)
        hashing.join()

    def build(partial: Path, extra: dict[str, Any], resume: Path) -> None:
        from caliport.export.make import fill

        if may_be_skipped:
            _say_needs(request, out, refuse)
        with working(title):
            fill(partial, extra, request, integers=integers or resume)

    stage(out, "export", title, request.inputs(), request.settings(), build)


def _say_needs(request: Request, out: Path, refuse: bool) -> None:
    from caliport.export.preflight import preflight

    preflight(request, out, refuse=refuse)


def _hash_ahead(inputs: Mapping[str, Path | str]) -> None:
    """Hash inputs ahead of ``stage`` while libraries are imported; ``stage`` reports the errors.

    Runs in a daemon thread, so that an error need not wait until all of a large base is read.
    """
    with suppress(Exception):
        hashes_of(inputs)
