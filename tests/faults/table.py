"""The faults: each is one that has been seen in exporters, or is one slip away."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from caliport.export.decoder.stored import Weights
from caliport.export.quantization.quantizers.registry import QUANTIZERS
from caliport.validation.runners.runner import Runner
from tests.conftest import TEXTS
from tests.faults.making import Fault, Patch, everywhere, nothing, put
from tests.faults.scene import RANK, Tensors, edit_json, edit_tensors
from tests.sampling import some_of

_FIRST = "model.layers.0."
_BLOCK = 64

SEEDS = some_of(6, range(1, 21))
"""Of the sound artifacts: weights, adapter and prompts."""


def _without(part: str) -> Callable[[Tensors], Tensors]:
    """An adapter that leaves some modules alone."""

    def change(tensors: Tensors) -> Tensors:
        return {name: value for name, value in tensors.items() if part not in name}

    return change


def _doubled(tensors: Tensors) -> Tensors:
    return {n: 2 * v if "lora_B" in n else v for n, v in tensors.items()}


def _layers_swapped(tensors: Tensors) -> Tensors:
    other = {"layers.0.": "layers.1.", "layers.1.": "layers.0."}
    return {
        name: tensors[name.replace(layer, other[layer])]
        for name in tensors
        for layer in other
        if layer in name
    }


def _transposed(tensors: Tensors) -> Tensors:
    """B of one module, stored row after row where columns were meant."""

    def change(name: str, value: Tensor) -> Tensor:
        odd = "layers.0.self_attn.q_proj" in name and "lora_B" in name
        return value.reshape(value.shape[1], value.shape[0]).T if odd else value

    return {name: change(name, value) for name, value in tensors.items()}


def _uncalibrated(tensors: Tensors) -> Tensors:
    """Without the rank that calibration added."""
    kept = {n: v.clone() for n, v in tensors.items()}
    for name, value in kept.items():
        if "lora_B" in name:
            value[:, RANK - 1] = 0
    return kept


def _earlier(tensors: Tensors) -> Tensors:
    """Of a calibration that ended elsewhere."""
    draw = torch.Generator().manual_seed(9)
    return {n: v + 0.1 * v.std() * torch.randn(v.shape, generator=draw) for n, v in tensors.items()}


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda base: edit_json(base / "config.json", **changes)


def _untied(base: Path) -> None:
    """A head of its own where the checkpoint ties it to the embedding."""
    edit_json(base / "config.json", tie_word_embeddings=False)

    def change(tensors: Tensors) -> Tensors:
        table = tensors["model.embed_tokens.weight"]
        head = torch.randn(table.shape, generator=torch.Generator().manual_seed(3)) * table.std()
        return {**tensors, "lm_head.weight": head}

    edit_tensors(base, change)


def _ends_at_pad(base: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        edit_json(base / name, eos_token_id=0)


def _other_tokenizer(directory: Path) -> None:
    from caliport.calibrate.training.small_base import build_tokenizer

    other = build_tokenizer([text[::-1] for text in TEXTS], 384)
    other.chat_template = (directory / "chat_template.jinja").read_text()
    other.save_pretrained(directory)


def _other_template(directory: Path) -> None:
    path = directory / "chat_template.jinja"
    path.write_text(path.read_text().replace("message['content']", "message['content'] + '\\n'"))


def _row_shifted(weights: Weights) -> None:
    name = "model.embed_tokens.weight.data"
    table = weights[name].tensor().clone()
    table[100] = table[101]
    put(weights, name, table)


def _row_scale(weights: Weights) -> None:
    name = f"{_FIRST}mlp.down_proj.weight.scale"
    scale = weights[name].tensor().clone()
    scale[7] *= 2
    put(weights, name, scale)


def _half_scales(weights: Weights) -> None:
    for name, stored in weights.items():
        if name.endswith(".scale"):
            put(weights, name, stored.tensor().half().float())


def _layers_exchanged(weights: Weights) -> None:
    for part in ("data", "scale"):
        one, two = (f"model.layers.{i}.mlp.up_proj.weight.{part}" for i in (0, 1))
        kept = weights._stored
        kept[one], kept[two] = kept[two], kept[one]


def _in_doubled_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """As ``hqq.in_groups``, which is compiled for its size, but by the largest weight."""
    groups = weight.reshape(-1, _BLOCK)
    least = torch.finfo(torch.float32).eps
    scales = (groups.abs().amax(1) / 8).clamp_min(least).bfloat16()
    whole = (
        (groups / scales.float()[:, None]).round().clamp(-8, 7).to(torch.int8).view(weight.shape)
    )
    data = (whole + 8).view(torch.uint8)
    return data[:, 0::2] | data[:, 1::2] << 4, scales.view(len(weight), -1)


def _quantize_by(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[..., Any]) -> None:
    """Let a quantizer find its integers another way."""
    entry = QUANTIZERS[name]
    changed = replace(entry, quantize=lambda weight, _: function(weight))
    module = f"caliport.export.quantization.quantizers.{name.replace('-', '_')}"
    monkeypatch.setattr(f"{module}.QUANTIZER", changed)


def _groups_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    _quantize_by(monkeypatch, "hqq", _in_doubled_groups)
    for module in (
        "quantization.tensors",
        "decoder.skeleton",
        "onnx.graph.layouts",
        "decoder.stored",
    ):
        monkeypatch.setattr(f"caliport.export.{module}.GROUP_SIZE", _BLOCK)


def _zero_point_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows quantized from their least to their largest value, and the zero point not kept."""

    def by_row(weight: Tensor) -> tuple[Tensor, Tensor]:
        least, most = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        scale = ((most - least) / 255).clamp_min(1e-6)
        zero = (-128 - least / scale).round()
        data = (weight / scale + zero).round().clamp(-128, 127)
        return data.to(torch.int8), scale

    _quantize_by(monkeypatch, "max-abs", by_row)


def _in_llama(part: str, change: Callable[..., Any]) -> dict[str, Patch]:
    """Change a method of transformers' Llama; ``change`` gets the method and its arguments."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.models.llama import modeling_llama

        name, method = part.split(".")
        kind = getattr(modeling_llama, name)
        plain = getattr(kind, method)

        @functools.wraps(plain)
        def changed(*args: Any, **kwargs: Any) -> Any:
            return change(plain, *args, **kwargs)

        monkeypatch.setattr(kind, method, changed)

    return everywhere(patch)


def _per_tensor(plain: Any, module: Any, x: Tensor) -> Any:
    scale = x.abs().amax(-1).amax(-1).amax(-1) / 127
    return plain(module, torch.round(x / scale) * scale)


def _half_precision(plain: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
    """The second layer's output passes through float16 at a size at which it overflows."""
    out = plain(layer, *args, **kwargs)
    return (out * 32768).half().float() / 32768 if layer.self_attn.layer_idx == 1 else out


def _attention_scale(plain: Any, module: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    plain(module, config, *args, **kwargs)
    module.scaling = config.hidden_size**-0.5


def _late_positions(plain: Any, *args: Any, position_ids: Tensor, **kwargs: Any) -> Any:
    """Whatever comes after a prefill stands one position too late."""
    late = position_ids + position_ids[:, :1].clamp(max=1)
    return plain(*args, position_ids=late, **kwargs)


def _mask(change: Callable[[Tensor, Tensor], Tensor]) -> Patch:
    """Give ExecuTorch's attention a mask: ``change`` gets keys and queries, both positions."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        from caliport.export.executorch import decoder as module

        def mask(self: Any, **options: Any) -> Tensor:
            queries, keys = self.positions.transpose(0, 1), torch.arange(self.context)
            seen = (keys <= queries) & change(keys, queries)
            self.masks.append(torch.where(seen, 0.0, module._UNSEEN))
            return self.masks[-1]

        monkeypatch.setattr(module._Attention, "mask", mask)

    return patch


def _graph(change: Callable[[Any], None]) -> Callable[[Path], None]:
    """Change a finished ONNX graph, its weights left where they are."""

    def after(directory: Path) -> None:
        import onnx

        model = onnx.load(directory / "model.onnx", load_external_data=False)
        change(model.graph)
        onnx.save(model, directory / "model.onnx")

    return after


def _attentions(graph: Any) -> list[Any]:
    return [node for node in graph.node if node.op_type == "GroupQueryAttention"]


def _insert(graph: Any, before: Any, *nodes: Any) -> None:
    place = list(graph.node).index(before)
    for node in reversed(nodes):
        graph.node.insert(place, node)


def _constant(graph: Any, name: str, values: list[int], kind: int) -> str:
    from onnx import helper

    graph.initializer.append(helper.make_tensor(name, kind, [len(values)], values))
    return name


def _late_cache(graph: Any) -> None:
    """The second layer finds each cached key one place too early."""
    from onnx import TensorProto, helper

    node = _attentions(graph)[1]
    one = _constant(graph, "one", [1], TensorProto.INT64)
    end = _constant(graph, "end", [1 << 30], TensorProto.INT64)
    last = _constant(graph, "last", [-1], TensorProto.INT64)
    axis = _constant(graph, "axis", [2], TensorProto.INT64)
    past = node.input[3]
    _insert(
        graph,
        node,
        helper.make_node("Slice", [past, one, end, axis], ["later"]),
        helper.make_node("Slice", [past, last, end, axis], ["newest"]),
        helper.make_node("Concat", ["later", "newest"], ["moved"], axis=2),
    )
    node.input[3] = "moved"


def _short_mask(graph: Any) -> None:
    """Attention is told of one token fewer than there are, after the first."""
    from onnx import TensorProto, helper

    first = _attentions(graph)[0]
    one = _constant(graph, "one", [1], TensorProto.INT32)
    zero = _constant(graph, "zero", [0], TensorProto.INT32)
    _insert(
        graph,
        first,
        helper.make_node("Sub", [first.input[5], one], ["fewer"]),
        helper.make_node("Max", ["fewer", zero], ["short"]),
    )
    for node in _attentions(graph):
        node.input[5] = "short"


def _window(graph: Any) -> None:
    from onnx import helper

    for node in _attentions(graph):
        kept = [a for a in node.attribute if a.name != "local_window_size"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("local_window_size", _BLOCK)])


class Remembering:
    """A runner whose cache is not forgotten until it is full."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.name, self.context = runner, runner.name, runner.context
        self._length = 0

    def prefill(self, tokens: list[int]) -> Any:
        self.reset()
        return self.extend(tokens)

    def step(self, token: int) -> Any:
        return self.extend([token])

    def extend(self, tokens: list[int]) -> Any:
        if self._length + len(tokens) > self.context:
            self.runner.reset()
            self._length = 0
        self._length += len(tokens)
        return self.runner.extend(tokens)  # type: ignore[attr-defined]

    def reset(self) -> None:
        pass


def _files(change: Callable[[Path], None]) -> dict[str, Callable[[Path], None]]:
    return {"executorch": change, "onnx": change}


_ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}

FAULTS = [
    Fault("adapter left out", "adapter", adapter=lambda t: {n: 1e-9 * v for n, v in t.items()}),
    Fault("adapter left out of one module", "adapter", adapter=_without("layers.1.self_attn.v_")),
    Fault("adapter left out of one layer", "adapter", adapter=_without("layers.1.")),
    Fault("LoRA scaling off by 2", "adapter", adapter=_doubled),
    Fault("A and B of two layers swapped", "adapter", adapter=_layers_swapped),
    Fault("B of one module transposed", "adapter", adapter=_transposed),
    Fault("calibration vector missing", "adapter", precision="int4", adapter=_uncalibrated),
    Fault("stale: an earlier calibration", "adapter", adapter=_earlier, recorded=True),
    Fault("group size doubled", "quantization", "int4", patch=everywhere(_groups_doubled)),
    Fault("zero point dropped", "quantization", patch=everywhere(_zero_point_dropped), drawn=True),
    Fault("one scale row doubled", "quantization", weights=_row_scale),
    Fault("scales rounded to float16", "quantization", weights=_half_scales),
    Fault(
        "activations quantized per tensor",
        "quantization",
        patch=_in_llama("LlamaMLP.forward", _per_tensor),
        taken_for="lowering",
    ),
    Fault(
        "cache position off by one",
        "lowering",
        patch={
            "executorch": _in_llama("LlamaForCausalLM.forward", _late_positions)["executorch"],
            "onnx": nothing,
        },
        after={"executorch": nothing, "onnx": _graph(_late_cache)},
    ),
    Fault("cache not reset", "lowering", runner=Remembering),
    Fault(
        "mask one token short",
        "lowering",
        patch={
            "executorch": _mask(lambda keys, queries: (keys < queries) | (queries == 0)),
            "onnx": nothing,
        },
        after={"executorch": nothing, "onnx": _graph(_short_mask)},
    ),
    Fault(
        "attention sees 64 tokens only",
        "lowering",
        patch={
            "executorch": _mask(lambda keys, queries: keys > queries - _BLOCK),
            "onnx": nothing,
        },
        after={"executorch": nothing, "onnx": _graph(_window)},
    ),
    Fault(
        "rope theta 500000 for 10000",
        "lowering",
        base=_config(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    ),
    Fault("rope scaled by 2", "lowering", base=_config(rope_parameters=_ROPE)),
    Fault("norm epsilon 1e-5 for 1e-6", "lowering", base=_config(rms_norm_eps=1e-5)),
    Fault("gelu for silu", "lowering", base=_config(hidden_act="gelu")),
    Fault("tied head lost", "lowering", base=_untied),
    Fault("embedding row shifted", "lowering", weights=_row_shifted),
    Fault("weights of two layers exchanged", "lowering", weights=_layers_exchanged),
    Fault(
        "attention scores scaled wrongly",
        "lowering",
        patch=_in_llama("LlamaAttention.__init__", _attention_scale),
    ),
    Fault(
        "float16 overflow in one layer",
        "lowering",
        patch=_in_llama("LlamaDecoderLayer.forward", _half_precision),
    ),
    Fault("wrong end of text", "packaging", base=_ends_at_pad, drawn=True),
    Fault("tokenizer of another model", "packaging", after=_files(_other_tokenizer)),
    Fault("chat template changed", "packaging", after=_files(_other_template)),
]
"""Every fault, by what it breaks."""
