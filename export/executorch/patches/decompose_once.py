"""Decompose a graph once instead of three times.

Upstream: executorch 1.5.1, ``executorch.exir.program._program._gen_edge_manager_for_partitioners``.
It traces the whole graph anew three times: to make it functional, to decompose what no delegate
takes, and to decompose what the partitioner kept but did not want after all. The second trace also
makes it functional, and the third usually finds nothing.

With another release the patch is skipped: lowering takes longer and gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from caliport.core.patching import is_tested, swapped

if TYPE_CHECKING:
    from torch.export import ExportedProgram

RELEASES = ("executorch==1.5.*", "torch==2.13.*")
_FUNCTIONAL = "caliport_functional"


@contextmanager
def decompose_once() -> Iterator[None]:
    """While the body runs, skip decompositions that a later one includes or that find nothing.

    Raises:
        RuntimeError: A skipped decomposition was not followed by one that includes it.
    """
    if not is_tested(RELEASES):
        yield
        return
    from torch.export import ExportedProgram

    plain = ExportedProgram.run_decompositions
    put_off: set[int] = set()

    def run(self: ExportedProgram, table: dict[Any, Any] | None = None, **more: Any) -> Any:
        if table is not None and not table:
            put_off.add(id(self))
            return self
        put_off.discard(id(self))
        if self.graph_module.meta.get(_FUNCTIONAL) and not _finds(self, table or {}):
            return self
        program = plain(self, table, **more)
        program.graph_module.meta[_FUNCTIONAL] = True
        return program

    with swapped(ExportedProgram, "run_decompositions", run):
        yield
    if put_off:
        raise RuntimeError("a program was not made functional; expected a decomposition after it")


def _finds(program: ExportedProgram, table: dict[Any, Any]) -> bool:
    """Whether a table decomposes a call in the graph; sizes stay as they are."""
    return any(
        node.op == "call_function"
        and node.target in table
        and node.target is not torch.ops.aten.sym_size.int
        for node in program.graph.nodes
    )
