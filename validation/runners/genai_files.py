"""The files of an onnxruntime-genai directory: its configuration, its model and adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from caliport.core.directories import check_recorded
from caliport.core.errors import InputError
from caliport.export.onnx.files import GENAI_CONFIG


def read_config(directory: Path) -> dict[str, Any]:
    """What ``genai_config.json`` says; the files that it names are the directory's own.

    Raises:
        InputError: No such file, none of a decoder, or one that names a graph that is not there or
            a path outside the directory.
    """
    path = directory / GENAI_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        graph = directory / config["model"]["decoder"]["filename"]
        int(config["model"]["context_length"])
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected an ONNX artifact directory") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a generation config ({line_of(error)})") from None
    for field, name in _named_files(config):
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
            raise InputError(f"{path}: {field} is {name!r}, expected a file of the directory")
    if not graph.is_file():
        raise InputError(
            f"{graph}: no such file, but {GENAI_CONFIG} names it as the decoder's graph"
        )
    assert isinstance(config, dict)
    return config


def _named_files(part: object) -> Iterator[tuple[str, str]]:
    """Every field of a config, at any depth, that names a file which is opened, and its value."""
    members = part if isinstance(part, list) else []
    if isinstance(part, dict):
        members = list(part.values())
        for field, value in part.items():
            if isinstance(value, str) and field.endswith(("filename", "custom_ops_library")):
                yield field, value
    for member in members:
        yield from _named_files(member)


def genai_model(directory: Path, threads: int | None = None) -> Any:
    """An ``onnxruntime_genai.Model``; ``threads`` in place of what its configuration says.

    Raises:
        InputError: The directory is not what its manifest records, or cannot be loaded.
    """
    import onnxruntime_genai as genai

    check_recorded(directory)
    read_config(directory)
    try:
        config = genai.Config(str(directory))
        options = {"log_severity_level": 4}  # errors come as exceptions
        if threads is not None:
            options["intra_op_num_threads"] = threads
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        return genai.Model(config)
    except Exception as error:
        raise InputError(
            f"{directory}: onnxruntime_genai cannot load it ({line_of(error)})"
        ) from error


def genai_adapters(model: Any, adapter: Path) -> Any:
    """An ``onnxruntime_genai.Adapters`` with one adapter, named after its file."""
    import onnxruntime_genai as genai

    adapters = genai.Adapters(model)
    try:
        adapters.load(str(adapter), adapter.stem)
    except Exception as error:
        raise InputError(f"{adapter}: not an adapter of ONNX Runtime ({line_of(error)})") from error
    return adapters


def check_room(count: int, length: int, context: int) -> None:
    """Raise ``InputError`` unless ``count`` tokens fit after ``length`` within ``context``."""
    if not count or length + count > context:
        raise InputError(
            f"{count} tokens after {length}; expected 1 to {context - length}, since the "
            f"artifact's context is {context}"
        )


def line_of(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
