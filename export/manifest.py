"""Check the manifest of an artifact that may come from a stranger, once, before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caliport.core.directories import MANIFEST
from caliport.core.errors import InputError
from caliport.core.untrusted import check_regular, mapping, number, shown
from caliport.export import runtime as runtimes
from caliport.export.quantization.choices import PRECISIONS
from caliport.export.quantization.quantizers.registry import of_int4

_MOST = 2**31 - 1
_BYTES = 2**60
_FLOAT = 1024  # most bits of a weight
_BASE = ("layers", "hidden_size", "vocab_size", "cache_values")


def check_artifact_manifest(manifest: Mapping[str, Any], directory: Path) -> None:
    """Check the types and ranges of an artifact's manifest, and the files that it names.

    Raises:
        InputError: No known runtime and precision, a field of another type or out of range, a
            composition's name that its runtime does not take, or its file outside the directory.
    """
    path = directory / MANIFEST
    runtime, precision = manifest.get("runtime"), manifest.get("precision")
    if runtime not in runtimes.names():
        expected = " or ".join(runtimes.names())
        raise InputError(f"{path}: runtime is {shown(runtime)}, expected {expected}")
    if precision not in PRECISIONS:
        raise InputError(
            f"{path}: precision is {shown(precision)}, expected "
            f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}"
        )
    if "context" in manifest:
        number(manifest["context"], f"{path}: context", 1, _MOST, whole=True)
    for label, digest in _part(manifest, "inputs", path).items():
        _check_text(digest, f"{path}: inputs.{label}")
    _check_sizes(_part(manifest, "sizes", path), path)
    base = _part(manifest, "base", path)
    for name in _BASE:
        if name in base:
            number(base[name], f"{path}: base.{name}", 0, _MOST, whole=True)
    _check_quantization(_part(manifest, "quantization", path), path)
    calibration = _part(manifest, "calibration", path)
    for module, digits in _part(calibration, "weights", path, "calibration.").items():
        where = f"{path}: calibration.weights.{module}"
        _check_texts(digits, where)
        if len(digits) != 2:
            raise InputError(f"{where} is {shown(digits)}, expected two hashes")
    if "bundle" in manifest:
        _check_bundle(mapping(manifest["bundle"], f"{path}: bundle"), str(runtime), directory)


def _part(found: Mapping[str, Any], name: str, path: Path, within: str = "") -> Mapping[str, Any]:
    return mapping(found.get(name, {}), f"{path}: {within}{name}")


def _check_text(value: object, where: str) -> None:
    if not isinstance(value, str):
        raise InputError(f"{where} is {shown(value)}, expected text")


def _check_texts(value: object, where: str) -> None:
    if not isinstance(value, list):
        raise InputError(f"{where} is {shown(value)}, expected a list")
    for each in value:
        _check_text(each, f"an entry of {where}")


def _check_sizes(sizes: Mapping[str, Any], path: Path) -> None:
    for name, size in sizes.items():
        if name == "bits_per_weight":
            number(size, f"{path}: sizes.{name}", 0, _FLOAT)
        else:
            number(size, f"{path}: sizes.{name}", 0, _BYTES, whole=True)
    for name in ("head", "embedding"):
        if "total" in sizes and name not in sizes:
            raise InputError(f"{path}: sizes has no `{name}`, expected it beside `total`")


def _check_quantization(choices: Mapping[str, Any], path: Path) -> None:
    _check_texts(choices.get("int8_layers", []), f"{path}: quantization.int8_layers")
    if not isinstance(tuned := choices.get("tune_norms", False), bool):
        raise InputError(
            f"{path}: quantization.tune_norms is {shown(tuned)}, expected true or false"
        )
    quantizer = choices.get("quantizer")
    if quantizer is not None and quantizer not in of_int4():
        raise InputError(
            f"{path}: quantization.quantizer is {shown(quantizer)}, expected "
            f"{' or '.join(of_int4())}"
        )
    for name, allowed in (("embedding_bits", (None, 4, 8)), ("cache_bits", (None, 8))):
        if (found := choices.get(name)) not in allowed or isinstance(found, bool | float):
            raise InputError(
                f"{path}: quantization.{name} is {shown(found)}, expected "
                f"{', '.join(map(str, allowed))}"
            )


def _check_bundle(bundle: Mapping[str, Any], runtime: str, directory: Path) -> None:
    path = directory / MANIFEST
    for name, facts in _part(bundle, "adapters", path, "bundle.").items():
        where = f"{path}: bundle.adapters.{name}"
        number(mapping(facts, where).get("bytes"), f"{where}.bytes", 0, _BYTES, whole=True)
    for module, shape in _part(bundle, "modules", path, "bundle.").items():
        if not isinstance(shape, list) or len(shape) != 2:
            raise InputError(
                f"{path}: bundle.modules.{module} is {shown(shape)}, expected two sizes"
            )
        for size in shape:
            number(size, f"{path}: bundle.modules.{module}", 1, _MOST, whole=True)
    for name, found in _part(bundle, "compositions", path, "bundle.").items():
        where = f"{path}: bundle.compositions.{name}"
        facts = mapping(found, where)
        try:
            runtimes.get(runtime).check_name(name)
        except InputError as problem:
            raise InputError(f"{where}: {problem}") from None
        number(facts.get("bytes"), f"{where}.bytes", 0, _BYTES, whole=True)
        _check_texts(facts.get("stands_on", []), f"{where}.stands_on")
        if "file" in facts or not runtimes.get(runtime).shares_adapters:
            _check_file(facts.get("file"), where, directory)


def _check_file(name: object, where: str, directory: Path) -> None:
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise InputError(f"{where}.file is {shown(name)}, expected a file of the directory")
    check_regular(directory / name, root=directory)
