"""Our packing is what ONNX Runtime's quantized operators read."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from caliport.export.onnx.graph.layouts import (
    Layout,
    lookup_layout,
    product_layout,
    unpack,
    unsigned,
)
from caliport.export.quantization.choices import row_scale_block
from caliport.export.reference.activations import quantize_blocks

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


def stored(data: np.ndarray, layout: Layout) -> np.ndarray:
    """Signed integers as the graph holds them."""
    if layout.bits == 4:
        whole = (data + 8).astype(np.uint8)
        whole = whole[:, 0::2] | whole[:, 1::2] << 4
    else:
        whole = unsigned(data, int(np.prod(layout.data_shape[1:])))
    return whole.reshape(layout.data_shape)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 140),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpacking_gives_back_what_was_stored(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    columns = columns * 32 if bits == 4 else columns
    half = 1 << (bits - 1)
    data = np.random.default_rng(seed).integers(-half, half, (rows, columns)).astype(np.int8)
    for layout in (
        product_layout(rows, columns, "int4" if bits == 4 else "int8"),
        lookup_layout(rows, columns, "rows int4" if bits == 4 else "rows int8"),
    ):
        np.testing.assert_array_equal(unpack(stored(data, layout), bits, columns), data)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 160, 704])
def test_onnxruntime_reads_the_layout(bits: int, columns: int) -> None:
    draw = np.random.default_rng(columns)
    half = 1 << (bits - 1)
    groups = columns // 32 if bits == 4 else 1
    data = draw.integers(-half, half, (48, columns)).astype(np.int8)
    scale = draw.uniform(0.01, 0.02, (48, groups)).astype(np.float32)
    layout = product_layout(48, columns, "int4" if bits == 4 else "int8")
    x = draw.standard_normal((3, columns)).astype(np.float32)
    found = multiply(x, data, scale, layout, accuracy_level=0)
    weight = data * np.repeat(scale, columns // groups, axis=1)
    np.testing.assert_allclose(found, x @ weight.T, rtol=1e-4, atol=1e-4)
    rounded = quantize_blocks(torch.from_numpy(x), layout.block).numpy()
    found = multiply(x, data, scale, layout, accuracy_level=4)
    np.testing.assert_allclose(found, rounded @ weight.T, rtol=1e-4, atol=1e-4)


def multiply(
    x: np.ndarray, data: np.ndarray, scale: np.ndarray, layout: Layout, *, accuracy_level: int
) -> np.ndarray:
    """``x`` times the stored weight, by a graph of this one operator."""
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", "data", "scale"],
        ["y"],
        domain="com.microsoft",
        K=layout.columns,
        N=layout.rows,
        bits=layout.bits,
        block_size=layout.block,
        accuracy_level=accuracy_level,
    )
    scales = np.ascontiguousarray(np.broadcast_to(scale, layout.scale_shape))
    weights = {"data": stored(data, layout), "scale": scales}
    return run_one(node, onnx.helper.make_tensor_value_info("x", FLOAT, x.shape), x, weights)


def run_one(
    node: onnx.NodeProto, info: onnx.ValueInfoProto, x: np.ndarray, weights: dict[str, np.ndarray]
) -> np.ndarray:
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [info],
        [onnx.helper.make_tensor_value_info("y", FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


@pytest.mark.parametrize("form", ["rows int8", "rows int8, tied", "rows int4"])
@pytest.mark.parametrize("columns", [64, 96, 704, 3072])
def test_onnxruntime_looks_rows_up(columns: int, form: str) -> None:
    """Exactly integer times scale; where both are tied, from the very bytes of the product."""
    draw = np.random.default_rng(columns)
    bits, groups = (4, columns // 32) if form == "rows int4" else (8, 1)
    half = 1 << (bits - 1)
    data = draw.integers(-half, half, (20, columns)).astype(np.int8)
    scale = draw.uniform(0.01, 0.02, (20, groups)).astype(np.float32)
    kind = "rows int4" if bits == 4 else "rows int8"
    head = product_layout(20, columns, "int4" if bits == 4 else "int8")
    layout = lookup_layout(20, columns, kind, head if form.endswith("tied") else None)
    if form != "rows int8":
        assert stored(data, layout).tobytes() == stored(data, head).tobytes()
        assert layout.scale_shape == head.scale_shape
    node = onnx.helper.make_node(
        "GatherBlockQuantized",
        ["data", "x", "scale"],
        ["y"],
        domain="com.microsoft",
        bits=bits,
        block_size=layout.block,
        gather_axis=0,
        quantize_axis=1,
    )
    rows = np.array([[3, 0, 19]])
    info = onnx.helper.make_tensor_value_info("x", INT64, rows.shape)
    scales = np.ascontiguousarray(np.broadcast_to(scale, layout.scale_shape))
    found = run_one(node, info, rows, {"data": stored(data, layout), "scale": scales})
    expected = data * np.repeat(scale, columns // groups, axis=1)
    np.testing.assert_array_equal(found[0], expected[rows[0]])


@pytest.mark.parametrize(("columns", "block"), [(64, 64), (160, 32), (704, 64), (2048, 256)])
def test_int8_block_wastes_no_bytes(columns: int, block: int) -> None:
    assert row_scale_block(columns) == block
    assert product_layout(2, columns, "int8").block == block
    assert product_layout(2, columns, "int4").block == 32
