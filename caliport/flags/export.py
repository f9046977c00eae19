"""``caliport export`` with flags: export one artifact, or add compositions to a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from caliport.core.errors import InputError
from caliport.core.progress import console
from caliport.core.prompts import recorded_prompt
from caliport.core.untrusted import shown
from caliport.export.quantization.choices import Goal
from caliport.export.quantization.text import TOKENS, CalibrationText
from caliport.export.request import Bundle, Request
from caliport.export.runtime import get, names
from caliport.flags.named import bundle_of, named
from caliport.stages.export import export_to
from caliport.stages.sources import text_from


def export_one(
    request: Request,
    out: Path,
    *,
    preflight: bool = True,
    repo_id: str | None = None,
    private: bool = False,
) -> None:
    """Export one artifact into ``out`` and, if ``repo_id`` is given, push it to the hub.

    Raises:
        InputError: An unknown runtime, an invalid ``repo_id``, or see ``export_to``.
    """
    from caliport.export.package.hub import check_repo_id, push

    if request.runtime not in names():
        raise InputError(f"--runtime is {request.runtime!r}, expected one of {', '.join(names())}")
    if repo_id is not None:
        check_repo_id(repo_id)
    bundle = request.bundle
    kind = "artifact" if bundle is None else "bundle"
    title = request.label
    if bundle is not None:
        title = f"bundle of {len(bundle.compositions)}: {title}"
    export_to(out, title, request, refuse=preflight)
    if request.quantization.precision == "int4" and request.text is None:
        console.print(
            "int4 without calibration text; --calibration FILE of examples makes it more accurate "
            "at the same size"
        )
    console.print(f"{kind}: {out}")
    if repo_id is not None:
        console.print(f"pushed: {push(out, repo_id, private=private)}")


def text_for(
    values: Sequence[str], tokens: int | None, prompt: str | None, beside: Bundle | None
) -> CalibrationText | None:
    """The text of ``--calibration FILE``, or ``NAME=FILE`` for each composition of a bundle.

    Raises:
        InputError: Not one file, or not one for each composition.
    """
    if not values:
        if tokens is not None:
            raise InputError("--calibration-tokens goes with --calibration FILE")
        return None
    if beside is None:
        if len(values) > 1:
            raise InputError(f"--calibration: found {len(values)} files, expected one")
        sources = {"": text_from(Path(values[0]), prompt)}
    elif len(values) == 1 and "=" not in values[0]:
        sources = {
            name: text_from(Path(values[0]), recorded_prompt(path))
            for name, path in beside.compositions.items()
        }
    else:
        files = named("--calibration", values)
        if set(files) != set(beside.compositions):
            raise InputError(
                f"--calibration names {', '.join(files)}, expected one file for each of "
                f"{', '.join(beside.compositions)}"
            )
        sources = {
            name: text_from(path, recorded_prompt(beside.compositions[name]))
            for name, path in files.items()
        }
    return CalibrationText(sources, TOKENS if tokens is None else tokens)


def goal_for(max_size: str | None, target_kl: float | None) -> Goal | None:
    """The goal of ``--max-size`` or ``--target-kl``.

    Raises:
        InputError: Both, or a size that is none.
    """
    if max_size is None and target_kl is None:
        return None
    if max_size is not None and target_kl is not None:
        raise InputError("--max-size and --target-kl: expected one of them")
    if max_size is None:
        return Goal(target_kl=target_kl)
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return Goal(int(TypeAdapter(ByteSize).validate_python(max_size)))
    except ValidationError:
        raise InputError(
            f"--max-size: found {shown(max_size)}, expected a size such as 95MB"
        ) from None


def bundle_for(runtime: str, compositions: Sequence[str], shared: Sequence[str]) -> Bundle:
    """The bundle given by ``--bundle NAME=DIR`` and ``--share NAME=DIR``.

    Raises:
        InputError: A flag that is not ``NAME=DIR``, or shared adapters for a runtime that does not
            support them.
    """
    bundle = bundle_of(compositions, shared)
    if bundle.shared and runtime in names() and not get(runtime).shares_adapters:
        sharing = " or ".join(name for name in names() if get(name).shares_adapters)
        raise InputError(
            f"--share goes with --runtime {sharing}; {runtime} stores each composition whole"
        )
    return bundle


def add_to_bundle(bundle: Path, compositions: Sequence[str]) -> None:
    """Add compositions, each ``NAME=DIR``, to a finished bundle for ONNX.

    Raises:
        InputError: See ``caliport.export.api.add_composition``.
    """
    from caliport.export.api import add_composition

    for name, path in named("--bundle", compositions).items():
        console.print(f"added: {add_composition(bundle, name, path)}")
