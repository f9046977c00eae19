"""Read a stranger's ONNX graph, and check it before a runtime opens it.

ONNX Runtime opens whatever file a tensor names, follows loops without an end, and says itself what
else is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caliport.core.errors import InputError, one_line
from caliport.core.files import file_hash
from caliport.core.untrusted import check_regular, shown

if TYPE_CHECKING:
    from onnx import ModelProto

_MOST = 2**31 - 1  # bytes of a protobuf message
_LOOPS = ("Loop", "Scan", "SequenceMap")
_sound: set[tuple[Path, str]] = set()


def read_graph(graph: Path) -> ModelProto:
    """An ONNX graph without the weights that lie beside it.

    Raises:
        InputError: Not a regular file of its directory, too large, or not ONNX.
    """
    import onnx

    check_regular(graph, _MOST, graph.parent)
    try:
        return onnx.load(graph, load_external_data=False)
    except Exception as error:
        raise InputError(f"{graph}: not an ONNX graph ({one_line(error)})") from error


def check_graph(graph: Path) -> None:
    """Check the files that a graph names, and that it has no loops; one seen is remembered.

    Raises:
        InputError: See ``read_graph``; a tensor in a file that is not a regular one of the
            directory, or a loop.
    """
    check_regular(graph, _MOST, graph.parent)
    seen = (graph.resolve(), file_hash(graph))
    if seen in _sound:
        return
    files: set[str] = set()
    try:
        messages = list(_messages(read_graph(graph)))
    except ValueError as error:
        raise InputError(f"{graph}: not an ONNX graph ({error})") from None
    for message in messages:
        kind = message.DESCRIPTOR.name
        if kind == "NodeProto" and message.op_type in _LOOPS:
            raise InputError(
                f"{graph}: has a {message.op_type}, expected a decoder's graph, which has no loops"
            )
        if kind == "TensorProto":
            files |= {entry.value for entry in message.external_data if entry.key == "location"}
    for name in sorted(files):
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(
                f"{graph}: has weights in {shown(name)}, expected a file of its directory"
            )
        check_regular(graph.parent / name, root=graph.parent)
    _sound.add(seen)


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all that are in it."""
    left = [message]
    while left:
        message = left.pop()
        yield message
        for field, value in message.ListFields():
            if field.message_type is not None:
                left.extend(value if field.is_repeated else [value])
            elif field.type == field.TYPE_STRING:
                for text in value if field.is_repeated else [value]:
                    if not isinstance(text, str):  # bytes, where they are not UTF-8
                        raise ValueError(f"{field.name} is not UTF-8")
