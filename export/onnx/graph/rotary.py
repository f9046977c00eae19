"""Rotary embeddings that ``GroupQueryAttention`` applies, with tables computed by the model.

Source: https://arxiv.org/abs/2104.09864. A family's ``apply_rotary_pos_emb`` and its rotary module
stay in the graph if they do anything but rotate the two halves of a head's first dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from caliport.export.decoder.patches.short_rotary import short_rotary
from caliport.export.onnx.graph.patches.watched_rotary import watched_rotary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The operator rotates a multiple of this number of dimensions (onnxruntime 1.31).
_MULTIPLE = 16


@dataclass(frozen=True)
class Turned:
    """Queries and keys before and after rotation, and tables, float32 [context, turned / 2]."""

    query: Tensor
    key: Tensor
    turned: tuple[Tensor, Tensor]
    cos: Tensor
    sin: Tensor


class Rotary(nn.Module):
    """The rotary embeddings of one decoder.

    Args:
        model: The decoder, on any device; its buffers must be real.
        context: Number of positions in the tables.
    """

    def __init__(self, model: PreTrainedModel, context: int) -> None:
        super().__init__()
        self._modules_of = [m for m in model.modules() if hasattr(m, "rope_type")]
        self._tables: list[tuple[nn.Module, Any, str]] = []
        with torch.no_grad(), short_rotary(model):
            for module in self._modules_of:
                for kind in module.rope_type if isinstance(module.rope_type, dict) else [None]:
                    self._add(module, kind, context)
        self._made: list[tuple[Tensor, Tensor, str]] = []
        self._turned: list[Turned] = []

    def _add(self, module: nn.Module, kind: str | None, context: int) -> None:
        rest = () if kind is None else (kind,)
        cos, sin = module(torch.zeros(1, 1, 1), torch.arange(context)[None], *rest)
        half = cos.shape[-1] // 2
        if all(torch.equal(table[..., :half], table[..., half:]) for table in (cos, sin)):
            name = f"table_{len(self._tables)}"
            self.register_buffer(f"{name}_cos", cos[0, :, :half].contiguous())
            self.register_buffer(f"{name}_sin", sin[0, :, :half].contiguous())
            self._tables.append((module, kind, name))

    @contextmanager
    def watching(self, model: PreTrainedModel) -> Iterator[None]:
        """While the body runs, record which queries and keys are rotated by which table."""
        self._made.clear()
        self._turned.clear()
        with ExitStack() as stack:
            for module in self._modules_of:
                handle = module.register_forward_hook(self._remember, with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(watched_rotary(model, self._watched))
            yield

    def _remember(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = [*args, *kwargs.values()]
        for known, kind, name in self._tables:
            if known is module and (
                kind is None or any(value == kind for value in given if isinstance(value, str))
            ):
                self._made.append((*output, name))

    def _watched(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def apply(
            query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            turned = plain(query, key, cos, sin, *args, **kwargs)
            name = next((n for c, s, n in self._made if c is cos and s is sin), None)
            if name is not None and not args and not kwargs and _turns_halves(plain, query, cos):
                tables = (getattr(self, f"{name}_{kind}") for kind in ("cos", "sin"))
                self._turned.append(Turned(query, key, turned, *tables))
            return turned

        return apply

    def before(self, query: Tensor, key: Tensor) -> Turned | None:
        """The rotation that gave these queries and keys; None if it was not recorded."""
        return next((t for t in self._turned if t.turned[0] is query and t.turned[1] is key), None)


def _turns_halves(plain: Callable[..., Any], query: Tensor, cos: Tensor) -> bool:
    """Whether a function rotates halves as the operator does, found by comparing outputs."""
    if cos.shape[-1] % _MULTIPLE:
        return False
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    dim, turned = int(query.shape[-1]), int(cos.shape[-1])
    with disable_proxy_modes_tracing(), unset_fake_temporarily():
        draw = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, 2, 3, dim, generator=draw) for _ in range(2))
        tables = [torch.randn(1, 3, turned // 2, generator=draw).repeat(1, 1, 2) for _ in range(2)]
        found = plain(q, k, *tables)
        cos, sin = (table[:, None] for table in tables)
        for before, after in ((q, found[0]), (k, found[1])):
            part, rest = before[..., :turned], before[..., turned:]
            first, second = part.chunk(2, -1)
            expected = part * cos + torch.cat([-second, first], -1) * sin
            if after.shape != before.shape or not torch.allclose(
                after, torch.cat([expected, rest], -1), atol=1e-6
            ):
                return False
    return True
