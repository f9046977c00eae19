"""Skip passes over a graph that has not changed.

Upstream: executorch 1.5.1, ``executorch.exir.pass_base._ExportPassBase.call``. Nearly every pass
ends by interpreting the whole graph under fake tensors to update its metadata, even if the pass
changed nothing: sixteen times for each delegate.

With another release the patch is skipped: lowering takes longer and gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from caliport.core.patching import is_tested, swapped

RELEASES = ("executorch==1.5.*", "torch==2.13.*")
_TRACED = "caliport_traced"


@contextmanager
def skip_idle_passes() -> Iterator[None]:
    """While the body runs, passes do not interpret a graph again if it has not changed since.

    A pass that overrides how nodes are interpreted always runs.
    """
    if not is_tested(RELEASES):
        yield
        return
    from executorch.exir.pass_base import ExportPass, _ExportPassBase

    with swapped(_ExportPassBase, "call", _lazy(_ExportPassBase.call, ExportPass)):
        yield


def _lazy(trace: Callable[..., Any], base: type) -> Callable[..., Any]:
    """``ExportPass.call`` that skips a graph which has not changed since its last trace."""
    from torch.fx.passes.infra.pass_base import PassResult

    def call(self: Any, graph_module: torch.fx.GraphModule) -> PassResult:
        traced = graph_module.meta.get(_TRACED)
        if not _interprets(type(self), base) and traced == _fingerprint(graph_module):
            return PassResult(graph_module, True)
        result = trace(self, graph_module)
        result.graph_module.meta[_TRACED] = _fingerprint(result.graph_module)
        return result

    return call


def _interprets(kind: type, base: type) -> bool:
    """Whether a pass changes how a graph is interpreted, beyond rewriting it in ``call``."""
    return any(
        name != "call" and not name.startswith("__") and getattr(kind, name) is not member
        for name in dir(base)
        if callable(member := getattr(base, name))
    )


def _fingerprint(graph_module: torch.fx.GraphModule) -> list[tuple[Any, ...]]:
    return [
        (node.op, node.name, node.target, str(node.args), str(node.kwargs))
        for node in graph_module.graph.nodes
    ]
