"""The files of an onnxruntime-genai directory: its configuration, its model and adapters.

A configuration can name native code to load, files to write and files anywhere, so it is read here
first, and all that is not known to be harmless is refused: nothing else may open the directory
before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from caliport.core.directories import check_recorded
from caliport.core.errors import InputError, one_line
from caliport.core.untrusted import (
    check_regular,
    mapping,
    number,
    parse_json,
    printable,
    read_text,
    shown,
)
from caliport.export.onnx.files import GENAI_CONFIG

_MOST = 2**31 - 1
_SMALL = 1 << 20  # most of a count that sizes a loop or a cache's shape
_STRING = 256  # characters
_NAME = re.compile(r"[^%]*")
_LAYERED = re.compile(r"[^%]*%d[^%]*")
_COUNTS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size")
_OBJECTS = {"model", "search", "decoder", "inputs", "outputs", "sliding_window", "session_options"}
# Threads, memory and logging. Others load libraries, read and write files or choose devices.
_OPTIONS = {
    "log_id",
    "log_severity_level",
    "log_verbosity_level",
    "intra_op_num_threads",
    "inter_op_num_threads",
    "enable_cpu_mem_arena",
    "enable_mem_pattern",
    "graph_optimization_level",
    "provider_options",
    "session.disable_prepacking",
    "session.dynamic_block_base",
    "session.inter_op.allow_spinning",
    "session.intra_op.allow_spinning",
    "session.set_denormal_as_zero",
    "session.use_device_allocator_for_initializers",
    "session.use_env_allocators",
}


def read_config(directory: Path) -> dict[str, Any]:
    """What ``genai_config.json`` says of a text decoder of one graph in the directory.

    Raises:
        InputError: No such file, none of a decoder, a graph that is not there, or anything that
            would load code, write a file, open one elsewhere or use another device.
    """
    path = directory / GENAI_CONFIG
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected an ONNX artifact directory")
    config = parse_json(read_text(path, root=directory), path, unique=True)
    _check_part(mapping(config, f"{path}: it"), f"{path}: ", "")
    model = mapping(config.get("model"), f"{path}: model")
    decoder = mapping(model.get("decoder"), f"{path}: model.decoder")
    number(model.get("context_length"), f"{path}: context_length", 1, _MOST, whole=True)
    for name in _COUNTS:
        if name in decoder or name != "num_attention_heads":
            number(decoder.get(name), f"{path}: {name}", 1, _SMALL, whole=True)
    for name in ("inputs", "outputs"):
        mapping(decoder.get(name), f"{path}: model.decoder.{name}")
    ends = ends_of(model, path)
    for token in (*ends, *(model.get(f"{kind}_token_id") for kind in ("bos", "pad"))):
        if token is not None:
            number(token, f"{path}: a special token's id", 0, _MOST, whole=True)
    _check_graph_name(directory, decoder.get("filename"))
    found: dict[str, Any] = config
    return found


def ends_of(model: Mapping[str, Any], path: Path) -> list[int]:
    """The token ids in ``eos_token_id``, one or a list.

    Raises:
        InputError: Anything else.
    """
    found = model.get("eos_token_id", [])
    found = found if isinstance(found, list) else [found]
    return [int(number(token, f"{path}: eos_token_id", 0, _MOST, whole=True)) for token in found]


def _check_graph_name(directory: Path, name: object) -> None:
    path = directory / GENAI_CONFIG
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise InputError(f"{path}: filename is {shown(name)}, expected a file of the directory")
    graph = directory / name
    if not graph.exists():
        raise InputError(
            f"{graph}: no such file, but {GENAI_CONFIG} names it as the decoder's graph"
        )
    check_regular(graph, _MOST, directory)


def _check_part(part: Mapping[str, Any], file: str, where: str) -> None:
    """Check every field of a part of a configuration, and of the parts in it."""
    for name, value in part.items():
        field = printable(f"{where}{name}", 100)
        if name in ("custom_ops_library", "enable_profiling"):
            raise InputError(
                f"{file}{field} is {shown(value)}, expected none: it would load code or write a "
                "file"
            )
        if where.endswith("session_options."):
            _check_option(name, value, f"{file}{field}")
        elif isinstance(value, dict):
            if name not in _OBJECTS:
                raise InputError(
                    f"{file}{field}: found an object, expected a text decoder of one graph, with "
                    f"{', '.join(sorted(_OBJECTS))}"
                )
            _check_part(value, file, f"{where}{name}.")
        elif isinstance(value, list):
            if not all(isinstance(each, int | float | str) for each in value):
                raise InputError(f"{file}{field}: found nested lists, expected numbers or words")
        elif isinstance(value, str):
            _check_string(name, value, f"{file}{field}", where)


def _check_string(name: str, value: str, field: str, where: str) -> None:
    if where.endswith(("inputs.", "outputs.")):
        names = _LAYERED if name.startswith(("past_", "present_")) else _NAME
        if len(value) > _STRING or not (names.fullmatch(value) or _NAME.fullmatch(value)):
            raise InputError(f"{field} is {shown(value)}, expected a name, with %d for the layer")
    elif (where, name) not in {("model.", "type"), ("model.decoder.", "filename")}:
        raise InputError(f"{field} is {shown(value)}, expected a number, true or false")
    elif name == "type" and len(value) > _STRING:
        raise InputError(f"{field} is {shown(value)}, expected a type of model")


def _check_option(name: str, value: object, field: str) -> None:
    if name == "provider_options":
        if value not in ([], [{"cpu": {}}], [{"CPU": {}}]):
            raise InputError(f"{field} is {shown(value)}, expected none: caliport runs on the CPU")
    elif name not in _OPTIONS:
        raise InputError(f"{field} is {shown(value)}, expected only {', '.join(sorted(_OPTIONS))}")
    elif name.endswith("num_threads"):
        number(value, field, 0, 1024, whole=True)
    elif not isinstance(value, int | str) or len(str(value)) > _STRING:
        raise InputError(f"{field} is {shown(value)}, expected a number or a word")


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

    check_regular(adapter, _MOST, adapter.parent)
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
    return one_line(error, 300)
