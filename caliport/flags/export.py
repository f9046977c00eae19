"""Exports from flags, one artifact or a bundle, and which layers lose most at 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from caliport.core.errors import InputError
from caliport.core.progress import console
from caliport.export.quantization.choices import Quantization
from caliport.export.runtime import RUNTIMES
from caliport.flags.named import named
from caliport.stages.export import bundle_to, export_to


def export_one(
    base: str,
    adapter: Path | None,
    runtime: str,
    how: Quantization,
    context: int | None,
    out: Path,
    *,
    preflight: bool = True,
    repo_id: str | None = None,
    private: bool = False,
) -> None:
    """Export one artifact into ``out`` and push it to ``repo_id`` where one is given."""
    _check(runtime, repo_id)
    title = f"{runtime} {how.precision}"
    export_to(out, title, base, adapter, runtime, how, context, preflight=preflight)
    _finish("artifact", out, repo_id, private)


def bundle_one(
    base: str,
    compositions: Sequence[str],
    shared: Sequence[str],
    runtime: str,
    how: Quantization,
    context: int | None,
    out: Path,
    *,
    preflight: bool = True,
    repo_id: str | None = None,
    private: bool = False,
) -> None:
    """Export a bundle of compositions, each ``NAME=DIR``, over one base; push it as ``export_one``.

    Raises:
        InputError: A flag that is no ``NAME=DIR``, an unknown runtime, shared adapters with onnx.
    """
    _check(runtime, repo_id)
    parts, adapters = named("--bundle", compositions), named("--share", shared)
    if runtime == "onnx" and adapters:
        raise InputError("--share goes with --runtime executorch; an .onnx_adapter holds all of it")
    title = f"bundle of {len(parts)}: {runtime} {how.precision}"
    bundle_to(out, title, base, parts, adapters, runtime, how, context, preflight=preflight)
    _finish("bundle", out, repo_id, private)


def _check(runtime: str, repo_id: str | None) -> None:
    from caliport.export.package.hub import check_repo_id

    if runtime not in RUNTIMES:
        raise InputError(f"--runtime is {runtime!r}, expected one of {', '.join(RUNTIMES)}")
    if repo_id is not None:
        check_repo_id(repo_id)


def _finish(kind: str, out: Path, repo_id: str | None, private: bool) -> None:
    from caliport.export.package.hub import push

    console.print(f"{kind}: {out}")
    if repo_id is not None:
        console.print(f"pushed: {push(out, repo_id, private=private)}")


def add_to_bundle(bundle: Path, compositions: Sequence[str]) -> None:
    """Add compositions, each ``NAME=DIR``, to a finished bundle for ONNX.

    Raises:
        InputError: See ``caliport.export.onnx.bundle.add_to_onnx_bundle``.
    """
    from caliport.export.onnx.bundle import add_to_onnx_bundle

    for name, path in named("--bundle", compositions).items():
        console.print(f"added: {add_to_onnx_bundle(bundle, name, path)}")
