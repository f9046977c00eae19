"""Each patch of ExecuTorch: that it is still needed, still fits, and is left out where untested."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack.partition.graphs import bilinear_2d, sdpa
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.devtools.backend_debug import get_delegation_info
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.exir.pass_base import ExportPass, _ExportPassBase
from executorch.extension.pybindings import portable_lib
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._higher_order_ops.executorch_call_delegate import executorch_call_delegate
from torch._higher_order_ops.utils import registered_hop_fake_fns
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from caliport.core.patching import is_tested, quiet
from caliport.export.decoder.shipped import ShippedDecoder, every, shipped_decoder
from caliport.export.executorch import lower as executorch
from caliport.export.executorch import patches
from caliport.export.executorch.patches import (
    affine_shapes,
    decompose_once,
    means_as_products,
    quantize_once,
    quantized_lookup,
    run_delegates_once,
    skip_idle_passes,
    skip_patterns,
    tanh_gelu,
    tied_tables,
    weight_keys,
)
from caliport.export.executorch.patches.fast_lowering import fast_lowering
from caliport.export.executorch.steps import finish
from caliport.export.quantization.tensors import quantized, unpacked
from caliport.validation.runners.executorch import ExecuTorchRunner

FASTER = {
    "skip_idle_passes": skip_idle_passes,
    "skip_patterns": skip_patterns,
    "affine_shapes": affine_shapes,
    "run_delegates_once": run_delegates_once,
    "decompose_once": decompose_once,
}
OTHERS = [
    means_as_products,
    quantize_once,
    quantized_lookup,
    tanh_gelu,
    tied_tables,
    weight_keys,
]
ANOTHER = ("executorch==0.1.*",)


class _Pair(nn.Module):
    """Two quantized products that read the same input, as keys and values do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("left", "right"):
            linear = nn.Linear(64, 32, bias=False)
            linear.weight = nn.Parameter(quantized(linear.weight, "int8"), requires_grad=False)
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x).sin()  # XNNPACK 1.5 has no sine: two delegates


class _Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


X = torch.linspace(-2, 3, 3 * 64).reshape(3, 64)


def _lowered(module: nn.Module, while_tracing: AbstractContextManager[None] | None = None) -> Any:
    with quiet(), torch.no_grad():
        with while_tracing or nullcontext():
            program = torch.export.export(module, (X,), strict=False)
        return to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )


def _program(module: nn.Module) -> bytes:
    with quiet():
        return bytes(_lowered(module).to_executorch().buffer)


def _run(program: bytes) -> Tensor:
    return portable_lib._load_for_executorch_from_buffer(program).forward([X])[0]


@pytest.fixture(scope="module")
def fast() -> bytes:
    with fast_lowering():
        return _program(_Pair())


def _count(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """The calls of a function from now on, by their first argument."""
    plain, calls = getattr(owner, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0] if args else None)
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_every_patch_was_tested_with_what_is_installed() -> None:
    files = {path.stem for path in Path(patches.__file__).parent.glob("*.py")}
    found = [*FASTER.values(), *OTHERS]
    assert files - {"__init__", "fast_lowering"} == {m.__name__.split(".")[-1] for m in found}
    for module in found:
        assert is_tested(module.RELEASES), module.__name__
        assert "\nUpstream: " in (module.__doc__ or "")


@pytest.mark.slow
@pytest.mark.parametrize("name", FASTER)
def test_a_faster_way_that_was_not_tested_is_left_out_and_the_bytes_are_the_same(
    name: str, fast: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FASTER[name], "RELEASES", ANOTHER)
    used = _count(monkeypatch, sdpa, "get_graphs")
    with fast_lowering():
        assert _program(_Pair()) == fast
    assert bool(used) == (name == "skip_patterns")


@pytest.mark.slow
def test_lowering_with_another_executorch_gives_the_same_bytes(
    fast: bytes, another: Callable[..., None]
) -> None:
    """``fast_lowering`` leaves everything in place then."""
    another(executorch="1.6.0", torchao="0.19.0")
    before = _ExportPassBase.call, dict(registered_hop_fake_fns)
    with fast_lowering():
        assert before == (_ExportPassBase.call, dict(registered_hop_fake_fns))
        assert _program(_Pair()) == fast


def test_passes_still_interpret_a_graph_that_has_not_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = _count(monkeypatch, _ExportPassBase, "call_submodule")
    with quiet():
        graph = torch.export.export(_Norm(), (X,), strict=False).module()
    for _ in range(2):
        graph = ExportPass()(graph).graph_module
    assert len(runs) == 2
    with skip_idle_passes.skip_idle_passes():
        graph = ExportPass()(graph).graph_module
        assert len(runs) == 3
        assert ExportPass()(graph).graph_module is graph
        assert len(runs) == 3
        next(n for n in graph.graph.nodes if n.op == "call_function").args = (1.0, X)
        with pytest.raises(Exception):  # noqa: B017, PT011  it runs, on a graph that is wrong
            ExportPass()(graph)


def test_patterns_are_still_traced_and_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with quiet():
        assert sdpa.get_graphs()
        assert bilinear_2d.get_graphs_dict()
    used = _count(monkeypatch, sdpa, "get_graphs") + _count(
        monkeypatch, bilinear_2d, "get_graphs_dict"
    )
    with skip_patterns.skip_patterns():
        assert sdpa.get_graphs() == []
        assert bilinear_2d.get_graphs_dict() == {}
        _lowered(_Norm())
    assert not used
    asked = _count(monkeypatch, sdpa, "get_graphs")
    scaled = _count(monkeypatch, bilinear_2d, "get_graphs_dict")
    _lowered(_Norm())
    assert asked
    assert scaled


def test_graphs_are_still_decomposed_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice without need: for nothing, and for what the second trace includes."""
    calls = _count(monkeypatch, torch.export.ExportedProgram, "run_decompositions")
    _lowered(_Pair())
    assert len(calls) == 3
    traced = _count(monkeypatch, torch.export.exported_program, "_decompose_exported_program")
    with decompose_once.decompose_once():
        _lowered(_Pair())
    assert len(traced) == 1
    with (
        pytest.raises(RuntimeError, match="not made functional"),
        decompose_once.decompose_once(),
    ):
        torch.export.export(_Pair(), (X,)).run_decompositions({})


def test_delegates_still_run_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    functions: Any = registered_hop_fake_fns
    plain, runs = functions[executorch_call_delegate], []

    def counted(lowered: Any, *args: Any) -> Any:
        runs.append(id(lowered.original_module))
        return plain(lowered, *args)

    monkeypatch.setitem(functions, executorch_call_delegate, counted)
    _program(_Pair())
    assert len(runs) > len(set(runs))
    runs.clear()
    with run_delegates_once.run_delegates_once():
        _program(_Pair())
    assert 0 < len(runs) == len(set(runs))


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_quantization_still_computes_on_fake_tensors() -> None:
    from torchao.quantization.quant_primitives import MappingType

    ops = torch.ops.torchao
    scales = (MappingType.ASYMMETRIC.name, (1, 64), torch.int8, -128, 127)

    def results(x: Tensor) -> list[Tensor]:
        scale, zero = ops.choose_qparams_affine(x, *scales, 1e-5, torch.float32, torch.int8)
        data = ops.quantize_affine(x, (1, 64), scale, zero, torch.int8, -128, 127)
        return [
            scale,
            zero,
            data,
            ops.dequantize_affine(data, (1, 64), scale, zero, torch.int8, -128, 127),
        ]

    with enable_python_dispatcher(), FakeTensorMode():  # as passes over a graph have it
        with _Operators() as plain:
            expected = results(torch.empty(3, 64))
        with affine_shapes.affine_shapes(), _Operators() as fast:
            found = results(torch.empty(3, 64))
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
    assert plain.count > 3 * fast.count
    real = results(X)
    with affine_shapes.affine_shapes():
        for one, other in zip(results(X), real, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_an_input_is_still_quantized_once_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = _count(monkeypatch, xnnpack_preprocess, "serialize_xnnpack_binary")

    class Sum(_Pair):
        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) + self.right(x)

    def quantizations() -> int:
        (graph,) = graphs
        graphs.clear()
        return sum(type(node.xnode_union).__name__ == "XNNConvert" for node in graph.xnodes)

    plain = _program(Sum())
    assert quantizations() == 2
    with quantize_once.quantized_once():
        once = _program(Sum())
    assert quantizations() == 1
    torch.testing.assert_close(_run(once), _run(plain), rtol=0, atol=0)
    monkeypatch.setattr(quantize_once, "RELEASES", ANOTHER)
    with quantize_once.quantized_once():
        assert _program(Sum()) == plain


def test_constants_are_still_keyed_by_content() -> None:
    twins = _Pair()
    twins.right.weight = twins.left.weight
    twins.left.weight = nn.Parameter(twins.right.weight.clone(), requires_grad=False)
    keys = _lowered(twins)._named_data_store.pte_data
    assert len(keys) == 2, "data and scale, of two layers"
    names: dict[str, str] = {}
    with weight_keys.deferred_weights(lambda name: True, names):
        held = _lowered(twins)._named_data_store
    assert set(names) == set(held.pte_data)
    assert sorted(names.values()) == [
        f"{side}.weight.{part}" for side in ("left", "right") for part in ("data", "scale")
    ]


def test_the_mean_of_a_norm_still_leaves_the_delegate(monkeypatch: pytest.MonkeyPatch) -> None:
    def left(edge: Any) -> list[str]:
        info = get_delegation_info(edge.exported_program().graph_module)
        found = info.delegation_by_operator
        return [name for name, op in found.items() if op.non_delegated and "mean" in name]

    plain = _lowered(_Norm())
    assert left(plain)
    norm = _Norm()
    product = _lowered(norm, means_as_products.means_as_products(norm, {64}))
    assert not left(product)
    expected, found = (_run(bytes(edge.to_executorch().buffer)) for edge in (plain, product))
    torch.testing.assert_close(found, expected)
    monkeypatch.setattr(means_as_products, "RELEASES", ANOTHER)
    assert left(_lowered(norm, means_as_products.means_as_products(norm, {64})))


@pytest.mark.parametrize("form", ["rows int8", "rows int4"])
def test_a_lookup_in_a_quantized_table_gives_its_rows(form: Any) -> None:
    embedding = nn.Embedding(40, 64)
    with torch.no_grad():
        tensor: Any = quantized(embedding.weight, form)
    data, scale = tensor.qdata, tensor.scale
    if form == "rows int4":  # the first of two values in the low half of a byte, offset by 8
        packed = (data + 8).to(torch.uint8)
        packed = packed[:, ::2] | packed[:, 1::2] << 4
        torch.testing.assert_close(unpacked(packed), data)
    else:
        packed = data
    embedding.weight_data = nn.Parameter(packed, requires_grad=False)
    embedding.weight_scale = nn.Parameter(scale, requires_grad=False)
    tokens = torch.tensor([[0, 7, 39]])
    with quantized_lookup.quantized_lookup(), torch.no_grad():
        found = embedding(tokens)
        program = torch.export.export(embedding, (tokens,), strict=False)
    values = data.float().unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)
    torch.testing.assert_close(found, values.flatten(1)[tokens])
    assert "quantized_decomposed.embedding" in str(program.graph)
    plain = torch.export.export(embedding, (tokens,), strict=False)
    assert "quantized_decomposed.embedding" not in str(plain.graph)


def test_xnnpack_still_takes_one_gelu_for_the_other() -> None:
    gelu = nn.GELU(approximate="tanh")
    with quiet():
        plain = _run(_program(gelu))
        patched = _run(bytes(_lowered(gelu, tanh_gelu.tanh_gelu()).to_executorch().buffer))
    torch.testing.assert_close(plain, nn.functional.gelu(X), atol=1e-6, rtol=0)
    expected = nn.functional.gelu(X, approximate="tanh")
    assert (plain - expected).abs().max() > 1e-4
    torch.testing.assert_close(patched, expected, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def tied_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, with a table that is most of the program."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    directory = tmp_path_factory.mktemp("tied")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def _emitted(decoder: ShippedDecoder, out: Path) -> tuple[int, np.ndarray]:
    """The size of a program and its logits."""
    constants = executorch.constant_methods(decoder.whole, 16, [2], 1)
    with quiet(), fast_lowering():
        edge = executorch.whole_program(decoder, every(decoder), 16, constants)
        with tied_tables.shared_tables(decoder):
            program = finish(edge).buffer
    (out / "model.pte").write_bytes(program)
    return len(program), ExecuTorchRunner(out).prefill([5, 9, 3])


@pytest.mark.slow
def test_a_tied_table_is_still_written_twice(
    tied_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shipped_decoder(tied_dir, None, "int4", tmp_path) as decoder:
        size, logits = _emitted(decoder, tmp_path)
        monkeypatch.setattr(tied_tables, "RELEASES", ANOTHER)
        larger, expected = _emitted(decoder, tmp_path)
        table = decoder.weights["lm_head.weight.data"].nbytes
    assert larger - size >= table
    np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize(
    "enter",
    [
        partial(weight_keys.deferred_weights, lambda name: True, {}),
        quantized_lookup.quantized_lookup,
        tanh_gelu.tanh_gelu,
    ],
    ids=["weight_keys", "quantized_lookup", "tanh_gelu"],
)
def test_a_patch_that_is_needed_refuses_another_executorch(
    enter: Callable[[], AbstractContextManager[None]], refused: Callable[..., None]
) -> None:
    refused(enter, executorch="1.6.0")
