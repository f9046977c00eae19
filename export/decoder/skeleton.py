"""A decoder cut down to one layer of each kind, without weights, for tracing and lowering.

Identical layers lower to identical programs, whatever their weights. So a runtime lowers a decoder
of a few layers whose matrices take no memory, and the result is repeated for the other layers.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from caliport.core.errors import InputError, one_line
from caliport.core.patching import exclusive
from caliport.export.quantization.choices import GROUP_SIZE, Form
from caliport.export.quantization.tensors import torchao_tensor

_PLAIN = (bool, int, float, str, tuple, type(None), torch.dtype)


@dataclass(frozen=True)
class Layers:
    """Which layers the skeleton keeps, and which kept layer represents each layer.

    Attributes:
        path: Name of the list of layers in the model, such as ``model.layers``.
        kept: Indices in the whole model of the layers that the skeleton keeps, in order. Layer 0
            is always kept and represents only itself.
        stands_for: For each layer of the whole model, the index in ``kept`` of the layer that
            represents it.
    """

    path: str
    kept: list[int]
    stands_for: list[int]

    def full_name(self, name: str, layer: int) -> str:
        """Name of a skeleton layer's parameter in the given layer of the whole model."""
        tail = name.removeprefix(f"{self.path}.").split(".")[1:]
        return ".".join([self.path, str(layer), *tail])

    def whole_name(self, name: str) -> str:
        """Name in the whole model of a module or parameter of the skeleton."""
        layer = self.index(name)
        return name if layer is None else self.full_name(name, self.kept[layer])

    def index(self, name: str) -> int | None:
        """Index of the skeleton's layer that a parameter is in; None if it is in no layer."""
        if not self.path or not name.startswith(f"{self.path}."):
            return None
        return int(name.removeprefix(f"{self.path}.").split(".")[0])


def shape_of(model: PreTrainedModel, layers: Layers, forms: Mapping[str, Form]) -> Hashable:
    """What a trace of a skeleton depends on, so that decoders of other weights share it.

    Args:
        model: The skeleton, before it is furnished.
        layers: Which layers its layers represent.
        forms: Of the whole decoder's layers.
    """
    settings = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
    names = (name for name, _ in model.named_modules())
    kept = tuple((name, forms.get(layers.whole_name(name))) for name in names)
    return json.dumps(settings, sort_keys=True, default=str), layers.path, kept


def empty(config: PretrainedConfig, buffers: bool = True) -> PreTrainedModel:
    """The decoder of a config with its parameters on the ``meta`` device.

    Args:
        config: The decoder's config.
        buffers: Allocate its buffers; otherwise they are on ``meta`` too and take no memory.

    Raises:
        InputError: transformers cannot build the model.
    """
    from accelerate import init_empty_weights

    try:
        # accelerate 1.15 replaces a method of nn.Module here.
        with exclusive(), init_empty_weights(include_buffers=not buffers):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:
        reason = one_line(error)
        raise InputError(f"config.json: transformers cannot build this model ({reason})") from error
    model.tie_weights()
    return model.eval()


def group_layers(
    model: PreTrainedModel, kind: Callable[[int], Hashable] = lambda _: None
) -> Layers:
    """Group layers with the same modules, shapes and settings.

    Args:
        model: The whole decoder, on any device.
        kind: Another property that layers of a group must share, such as the forms of their
            weights; called with the layer's index.

    Returns:
        The groups; each layer by itself if the model has no plain list of layers.
    """
    count = int(model.config.get_text_config().num_hidden_layers)
    path = next(
        (n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count),
        None,
    )
    if path is None:
        return Layers("", list(range(count)), list(range(count)))
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    lists = _per_layer(model.config.get_text_config(), count)
    kept: list[int] = [0]
    seen: dict[Hashable, int] = {}
    stands_for = [0]
    for index in range(1, count):
        signature = (_signature(layers[index]), *(repr(v[index]) for v in lists.values()))
        key = (signature, kind(index))
        if key not in seen:
            seen[key] = len(kept)
            kept.append(index)
        stands_for.append(seen[key])
    return Layers(path, kept, stands_for)


def _per_layer(config: PretrainedConfig, count: int) -> dict[str, list[Any]]:
    return {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == count
    }


def _signature(layer: nn.Module) -> Hashable:
    """Everything that distinguishes two layers except their position and weights."""
    parts = []
    for name, module in layer.named_modules():
        settings = {
            key: repr(value)
            for key, value in vars(module).items()
            if isinstance(value, _PLAIN) and key != "layer_idx"
        }
        shapes = {key: tuple(p.shape) for key, p in module.named_parameters(recurse=False)}
        parts.append(
            (name, type(module), tuple(sorted(settings.items())), tuple(sorted(shapes.items())))
        )
    return tuple(parts)


def skeleton(config: PretrainedConfig, layers: Layers) -> PreTrainedModel:
    """The decoder of a config with only the layers ``layers.kept``, parameters on ``meta``."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    for name, values in _per_layer(text, text.num_hidden_layers).items():
        setattr(text, name, [values[index] for index in layers.kept])
    text.num_hidden_layers = len(layers.kept)
    return empty(small)


def stand_in(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros that uses the memory of a single element."""
    return torch.zeros((1,) * len(shape), dtype=dtype).expand(shape)


def furnish(model: PreTrainedModel, layers: Layers, forms: Mapping[str, Form]) -> PreTrainedModel:
    """Give a skeleton stand-ins for the tensors that ship, in place.

    Quantized linear layers get torchao tensors. A quantized embedding also gets ``weight_data``
    and ``weight_scale``, which its lookup reads.
    """
    for name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            value = stand_in(tuple(parameter.shape), torch.float32)
            form = forms.get(layers.whole_name(name)) if key == "weight" else None
            if isinstance(module, nn.Linear) and parameter.dim() == 2:
                rows, width = parameter.shape
                value = matrix_stand_in(rows, width, form)
            setattr(module, key, nn.Parameter(value, requires_grad=False))
            if form is not None and isinstance(module, nn.Embedding):
                data, scale = _stand_ins(parameter.shape, form)
                if form == "rows int4":
                    data = stand_in((data.shape[0], data.shape[1] // 2), torch.uint8)
                module.register_parameter("weight_data", nn.Parameter(data, requires_grad=False))
                module.register_parameter("weight_scale", nn.Parameter(scale, requires_grad=False))
    return model


def matrix_stand_in(rows: int, width: int, form: Form | None) -> Tensor:
    """A stand-in for a linear layer's weight as it ships, [rows, width]."""
    if form is None:
        return stand_in((rows, width), torch.float32)
    return torchao_tensor(*_stand_ins(torch.Size((rows, width)), form), form)


def _stand_ins(shape: torch.Size, form: Form) -> tuple[Tensor, Tensor]:
    rows, width = shape
    groups = width // GROUP_SIZE if form.endswith("int4") else 1
    return stand_in((rows, width), torch.int8), stand_in((rows, groups), torch.float32)


_BOUNDARY = "caliport::boundary"


def boundary_op() -> Any:
    """An operator that marks where one layer ends and the next begins; it returns its input."""
    if not hasattr(torch.ops.caliport, "boundary"):
        torch.library.define(_BOUNDARY, "(Tensor x, int layer) -> Tensor")
        torch.library.impl(_BOUNDARY, "CompositeExplicitAutograd")(lambda x, layer: x.clone())
        torch.library.register_fake(_BOUNDARY)(lambda x, layer: torch.empty_like(x))
    return torch.ops.caliport.boundary


@contextmanager
def marked(
    model: PreTrainedModel, path: str, mark: Callable[[Tensor, int], Tensor]
) -> Iterator[None]:
    """While the body runs, hidden states between layers pass through ``mark(hidden, layer)``.

    It is called before layer i with i, and after the last of n layers with n.
    """
    found = model.get_submodule(path)
    assert isinstance(found, nn.ModuleList)
    layers = list(found)
    hooks = []

    def before(index: int) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            if args:
                return (mark(args[0], index), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": mark(kwargs["hidden_states"], index)}

        return hook

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (mark(output[0], len(layers)), *output[1:])
        return mark(output, len(layers))

    try:
        for index, layer in enumerate(layers):
            hooks.append(layer.register_forward_pre_hook(before(index), with_kwargs=True))
        hooks.append(layers[-1].register_forward_hook(after))
        yield
    finally:
        for hook in hooks:
            hook.remove()


class CannotRepeat(Exception):
    """The lowered layers cannot be separated; the decoder has to be lowered whole."""
