"""Every method of a bundle is its composition, and what is shared is stored once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from caliport.calibrate.low_rank import LowRankUpdate
from caliport.calibrate.merges.exact import exact
from caliport.calibrate.merges.linear import linear
from caliport.calibrate.peft_files import write_peft
from caliport.core.checkpoints import load_base
from caliport.core.errors import InputError
from caliport.export.decoder.shipped import shipped_decoder
from caliport.export.decoder.terms import Composed, halves, split
from caliport.export.executorch.bundle import Terms, lower_bundle
from caliport.export.executorch.patches.quantize_once import join
from caliport.export.quantization.choices import Form
from caliport.export.quantization.tensors import quantize
from caliport.export.reference.beside import beside
from caliport.validation.runners.executorch import ExecuTorchRunner
from tests.exports import to_executorch_bundle
from tests.sampling import thorough

CONTEXT = 64


def _random(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> LowRankUpdate:
    draw = torch.Generator().manual_seed(seed)
    return LowRankUpdate(
        {n: torch.randn(rank, i, generator=draw) * 0.1 for n, (o, i) in shapes.items()},
        {n: torch.randn(o, rank, generator=draw) * 0.1 for n, (o, i) in shapes.items()},
    )


def _shared_by_layers(shapes: Mapping[str, tuple[int, int]], seed: int) -> LowRankUpdate:
    """A correction as LC++ makes it: the same in all layers."""
    first = {n: s for n, s in shapes.items() if ".layers.0." in n}
    update = _random(first, 2, seed)
    like = {n: next(f for f in first if f.split(".")[3:] == n.split(".")[3:]) for n in shapes}
    return LowRankUpdate(
        {n: update.a[like[n]] for n in shapes}, {n: update.b[like[n]] for n in shapes}
    )


@pytest.fixture(scope="module")
def shapes(base_dir: Path) -> dict[str, tuple[int, int]]:
    return {
        name: (module.out_features, module.in_features)
        for name, module in load_base(base_dir).named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def _bundle(
    base: Path, out: Path, shapes: dict, precision: str, form: Form | None
) -> tuple[dict[str, LowRankUpdate], dict[str, LowRankUpdate], dict]:
    adapters = {name: _random(shapes, 4, seed) for seed, name in enumerate(("sum", "de", "fr"))}
    compositions = {
        f"sum_{to}": exact(
            [linear([adapters["sum"], adapters[to]]), _shared_by_layers(shapes, seed)], [1, 1]
        )
        for seed, to in enumerate(("de", "fr"), start=7)
    }
    parts = {name: split(update, adapters) for name, update in compositions.items()}
    with shipped_decoder(base, None, precision, out) as decoder:
        facts = lower_bundle(decoder, Terms(adapters, parts, form), out, CONTEXT, [2], 1)
    return adapters, compositions, facts


def _eager(
    base: Path,
    update: LowRankUpdate | None,
    adapters: Mapping[str, LowRankUpdate],
    precision: str,
    form: Form | None,
) -> PreTrainedModel:
    model = quantize(load_base(base), precision)
    return model if update is None else beside(model, split(update, adapters), adapters, form)


@pytest.mark.parametrize(
    ("precision", "form", "tolerance"),
    [
        thorough("fp32", None, 1e-5),
        # Activations are rounded to 8 bits, in the base and in the shared terms: one that falls the
        # other way moves logits by a step. Measured: 0.014, and as much for the base alone.
        pytest.param("int4", "int8", 0.03, marks=pytest.mark.slow),
    ],
)
def test_methods_give_their_compositions(
    base_dir: Path, tmp_path: Path, shapes: dict, precision: str, form: Form, tolerance: float
) -> None:
    adapters, compositions, facts = _bundle(base_dir, tmp_path, shapes, precision, form)
    assert facts["methods"] == ["forward", "sum_de", "sum_fr"]
    tokens = list(range(5, 40))
    found: dict[str, np.ndarray] = {}
    for method in facts["methods"]:
        model = _eager(base_dir, compositions.get(method), adapters, precision, form)
        with torch.no_grad():
            expected = model(torch.tensor([tokens])).logits[0].numpy()
        runner = ExecuTorchRunner(tmp_path, method=method)
        rows = [runner.prefill(tokens[:-9]), *(runner.step(token) for token in tokens[-9:])]
        found[method] = rows[-1]
        errors = np.abs(rows - expected[-10:]).max(1) / np.abs(expected[-10:]).max(1)
        assert np.median(errors) < tolerance, (method, errors)
    assert np.abs(found["sum_de"] - found["sum_fr"]).max() > 0.05
    sizes = facts["sizes"]
    layers = 2
    width = 4 if form is None else 2
    own = sum(width * 2 * (o + i) for o, i in shapes.values()) / layers
    assert sizes["compositions"] == {"sum_de": own, "sum_fr": own}, "stored once for all layers"


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 5), count=st.integers(1, 3))
def test_split_parts_are_the_update(seed: int, rank: int, count: int) -> None:
    shapes = {"a": (6, 8), "b": (5, 6)}
    adapters = {str(i): _random(shapes, rank, seed * 10 + i) for i in range(4)}
    used = dict(list(adapters.items())[:count])
    own = _random(shapes, 2, seed + 1)
    composed = exact([linear(list(used.values())), own], [1, 1])
    parts = split(composed, adapters)
    assert parts.adapters == tuple(used)
    assert parts.weight == pytest.approx(1 / count, rel=1e-4)
    assert parts.own is not None
    for name in shapes:
        inner = sum(u.a[name] for u in used.values())
        outer = sum(u.b[name] for u in used.values())
        delta = parts.weight**2 * outer @ inner + parts.own.delta(name)
        torch.testing.assert_close(delta, composed.delta(name), rtol=1e-4, atol=1e-5)


def test_an_update_that_is_no_merge_is_kept_whole() -> None:
    shapes = {"a": (6, 8)}
    adapters = {"one": _random(shapes, 2, 0)}
    other = _random(shapes, 3, 1)
    assert split(other, adapters) == Composed((), 1.0, other)


@pytest.mark.parametrize(("a_size", "b_size"), [(1.0, 1.0), (1e6, 1e-4), (1e-9, 1e2), (1e-3, 1e-3)])
def test_halves_keep_the_product(a_size: float, b_size: float) -> None:
    update = _random({"a": (6, 8)}, 3, 0)
    a, b = update.a["a"] * a_size, update.b["a"] * b_size
    half_a, half_b = halves(a, b)
    assert half_a.dtype == half_b.dtype == torch.float16
    delta = b @ a
    assert (half_b.float() @ half_a.float() - delta).norm() < 1e-3 * delta.norm()


def test_halves_of_a_correction_before_training_are_zero() -> None:
    update = _random({"a": (6, 8)}, 3, 0)
    half_a, half_b = halves(update.a["a"], torch.zeros(6, 3))
    assert torch.isfinite(half_a).all()
    assert not half_b.any()


def test_an_input_is_quantized_once_for_each_type_of_weights() -> None:
    from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema

    types = schema.XNNDatatype
    int4, int8 = types.xnn_datatype_qbint4, types.xnn_datatype_qcint8
    nodes, values = [], [_value(schema, 0, types.xnn_datatype_fp32)]
    for index, kind in enumerate((int4, int8, int4)):
        quantized, weight, result = (10 * (index + 1) + i for i in range(3))
        values += [
            _value(schema, quantized, types.xnn_datatype_qdint8),
            _value(schema, weight, kind),
            _value(schema, result, types.xnn_datatype_fp32),
        ]
        nodes += [
            schema.XNNConvert(input_id=0, output_id=quantized, flags=0),
            schema.XNNFullyConnected(quantized, weight, 0xFFFFFFFF, result, 0),
        ]
    graph = schema.XNNGraph(
        version="0",
        xnodes=[schema.XNode(node, 0) for node in nodes],
        xvalues=values,
        num_externs=0,
        input_ids=[0],
        output_ids=[12, 22, 32],
        constant_data=[],
    )
    join(graph)
    kept = [node.xnode_union for node in graph.xnodes]
    products = [node for node in kept if isinstance(node, schema.XNNFullyConnected)]
    assert [product.input1_id for product in products] == [10, 20, 10]
    assert len(kept) == 5, "two quantizations for three products"
    assert 30 not in [value.xvalue_union.id_out for value in graph.xvalues]
    assert len(graph.xvalues) == 9


def _value(schema: Any, index: int, kind: Any) -> Any:
    return schema.XValue(schema.XNNTensorValue(kind, 1, [1], 0, 0, 0, index))


def test_layers_without_terms_are_refused(tmp_path: Path) -> None:
    """GPT-2's Conv1D can be folded into, but a bundle would leave its update out."""
    base = tmp_path / "base"
    config = GPT2Config(
        n_layer=1, n_embd=32, n_head=2, vocab_size=64, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(base)
    write_peft(_random({"transformer.h.0.attn.c_attn": (96, 32)}, 2, 0), tmp_path / "adapter")
    with pytest.raises(InputError, match=r"c_attn, a Conv1D; a bundle supports updates of linear"):
        to_executorch_bundle(base, {"one": tmp_path / "adapter"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
