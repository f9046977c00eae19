"""Lower several times faster, to the same bytes: leave out work that cannot change anything.

executorch 1.5.1 ends nearly every pass by interpreting the whole graph under fake tensors to renew
its metadata, also when the pass has changed nothing: sixteen times over for every delegate.
It also traces reference graphs of attention and of image scaling to look for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

_TRACED = "caliport_traced"


@contextmanager
def skip_idle_work() -> Iterator[None]:
    """While the body runs, passes over an unchanged graph return it as it is.

    A pass that overrides how nodes are interpreted always runs. Neither plain attention nor image
    scaling is searched for: attention is one custom operator here. A test compares the bytes of a
    program lowered with and without this.
    """
    from executorch.backends.xnnpack.partition.graphs import bilinear_2d, sdpa
    from executorch.exir.pass_base import ExportPass, _ExportPassBase
    from torch.fx.passes.infra.pass_base import PassResult

    trace = _ExportPassBase.call

    def call(self: Any, graph_module: torch.fx.GraphModule) -> PassResult:
        plain = not _interprets(type(self), ExportPass)
        if plain and graph_module.meta.get(_TRACED) == _fingerprint(graph_module):
            return PassResult(graph_module, True)
        result = trace(self, graph_module)
        result.graph_module.meta[_TRACED] = _fingerprint(result.graph_module)
        return result

    with (
        patch.object(_ExportPassBase, "call", call),
        patch.object(sdpa, "get_graphs", list),
        patch.object(bilinear_2d, "get_graphs_dict", dict),
    ):
        yield


def _interprets(kind: type, base: type) -> bool:
    """Whether a pass changes what interpreting a graph gives, beyond rewriting it in ``call``."""
    return any(
        name != "call" and callable(member) and getattr(kind, name) is not member
        for name in dir(base)
        if not name.startswith("__") and (member := getattr(base, name)) is not None
    )


def _fingerprint(graph_module: torch.fx.GraphModule) -> list[tuple[Any, ...]]:
    return [
        (node.op, node.name, node.target, str(node.args), str(node.kwargs))
        for node in graph_module.graph.nodes
    ]
