"""Emit an ExecuTorch program with embedding tables from files, and tied tables stored once.

Upstream: executorch 1.5.1, ``executorch.exir._serialize._program``. A lookup reads its table from
the program's constants and a delegate its weights from named data, and ExecuTorch writes the two to
separate segments. A tied head has the same bytes as the embedding, so they are written twice.
Segments are ranges of the file with an offset and a size, and the runtime maps each separately; so
the head's segment is pointed at the embedding's bytes.

With another release the patch is skipped: the program computes the same and stores the table twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from caliport.core.patching import is_tested, swapped
from caliport.export.executorch.patches.weight_keys import final_key

if TYPE_CHECKING:
    from caliport.export.decoder.shipped import ShippedDecoder
    from caliport.export.decoder.stored import Stored

RELEASES = ("executorch==1.5.*",)


@contextmanager
def shared_tables(decoder: ShippedDecoder) -> Iterator[None]:
    """While the body runs, programs are emitted with the decoder's tied tables stored once.

    Args:
        decoder: The decoder whose weights the programs use.
    """
    if not is_tested(RELEASES):
        yield
        return
    from executorch.exir._serialize import _program
    from executorch.exir._serialize._cord import Cord
    from executorch.exir.schema import DataSegment

    tables = _tables(decoder)
    placed: dict[str, tuple[int, int]] = {}  # a table's key: its index among constants, its size
    shared: dict[int, tuple[int, int]] = {}  # a segment: the same
    constants_of = _program._extract_constant_segment
    named_of, flatbuffer_of = _program._extract_named_data, _program._program_to_flatbuffer

    def extract_constant_segment(constants: list[Any], *args: Any, **options: Any) -> Any:
        placed.update(_from_files(constants, tables))
        return constants_of(constants, *args, **options)

    def extract_named_data(program: Any, segments: list[Any], *args: Any) -> None:
        named_of(program, segments, *args)
        for named in program.named_data:
            if named.key in placed:
                shared[named.segment_index] = placed[named.key]
                segments[named.segment_index].data = Cord()

    def program_to_flatbuffer(program: Any, **options: Any) -> Any:
        constants = program.constant_segment
        for segment, (index, size) in shared.items():
            start = program.segments[constants.segment_index].offset + constants.offsets[index]
            program.segments[segment] = DataSegment(offset=start, size=size)
        return flatbuffer_of(program, **options)

    with (
        swapped(_program, "_extract_constant_segment", extract_constant_segment),
        swapped(_program, "_extract_named_data", extract_named_data),
        swapped(_program, "_program_to_flatbuffer", program_to_flatbuffer),
    ):
        yield


def _tables(decoder: ShippedDecoder) -> dict[bytes, tuple[str, Stored]]:
    """Names and contents of the quantized embeddings, by the hash of their content."""
    found = {}
    for name, module in decoder.whole.named_modules():
        if isinstance(module, nn.Embedding) and name in decoder.forms:
            stored = decoder.weights[f"{name}.weight.data"]
            found[stored.sha256] = (f"{name}.weight.data", stored)
    return found


def _from_files(
    constants: list[Any], tables: dict[bytes, tuple[str, Stored]]
) -> dict[str, tuple[int, int]]:
    """Read constants that are tables from their files; return the key, index and size of each."""
    from executorch.exir._serialize._cord import FileBackedData

    sizes = {stored.nbytes for _, stored in tables.values()}
    found = {}
    for index, buffer in enumerate(constants):
        if len(buffer.storage) in sizes:
            digest = hashlib.sha256(buffer.storage).digest()
            if digest in tables:
                name, stored = tables[digest]
                buffer.storage = FileBackedData(str(stored.path), sha256=stored.sha256)
                found[final_key(name, stored)] = (index, stored.nbytes)
    return found
