"""Our packing is what ONNX Runtime's quantized operators read."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.activations import quantize_blocks
from export.matmul_nbits import block_scales, block_size, pack, row_block, unpack

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 140),
    block=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpacking_gives_back_what_was_packed(
    bits: int, rows: int, columns: int, block: int, seed: int
) -> None:
    half = 1 << (bits - 1)
    data = np.random.default_rng(seed).integers(-half, half, (rows, columns)).astype(np.int8)
    np.testing.assert_array_equal(unpack(pack(data, bits, block), bits, columns), data)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 160, 704])
def test_onnxruntime_reads_the_packing(bits: int, columns: int) -> None:
    draw = np.random.default_rng(columns)
    half = 1 << (bits - 1)
    groups = columns // 32 if bits == 4 else 1
    data = draw.integers(-half, half, (48, columns)).astype(np.int8)
    scale = draw.uniform(0.01, 0.02, (48, groups)).astype(np.float32)
    block = block_size(columns, groups)
    x = draw.standard_normal((3, columns)).astype(np.float32)
    found = multiply(x, data, scale, bits=bits, accuracy_level=0)
    weight = data * np.repeat(scale, columns // groups, axis=1)
    np.testing.assert_allclose(found, x @ weight.T, rtol=1e-4, atol=1e-4)
    rounded = quantize_blocks(torch.from_numpy(x), block).numpy()
    found = multiply(x, data, scale, bits=bits, accuracy_level=4)
    np.testing.assert_allclose(found, rounded @ weight.T, rtol=1e-4, atol=1e-4)


def multiply(
    x: np.ndarray, data: np.ndarray, scale: np.ndarray, *, bits: int, accuracy_level: int
) -> np.ndarray:
    """``x`` times the packed weight, by a graph of this one operator."""
    outputs, inputs = data.shape
    block = block_size(inputs, scale.shape[1])
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", "data", "scale"],
        ["y"],
        domain="com.microsoft",
        K=inputs,
        N=outputs,
        bits=bits,
        block_size=block,
        accuracy_level=accuracy_level,
    )
    weights = {"data": pack(data, bits, block), "scale": block_scales(scale, inputs, block)}
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


@pytest.mark.parametrize("columns", [16, 96, 704, 3072])
def test_onnxruntime_reads_rows_with_one_scale(columns: int) -> None:
    draw = np.random.default_rng(columns)
    data = draw.integers(-128, 128, (20, columns)).astype(np.int8)
    scale = draw.uniform(0.01, 0.02, (20, 1)).astype(np.float32)
    node = onnx.helper.make_node(
        "GatherBlockQuantized",
        ["data", "x", "scale"],
        ["y"],
        domain="com.microsoft",
        bits=8,
        block_size=row_block(columns),
        gather_axis=0,
        quantize_axis=1,
    )
    rows = np.array([[3, 0, 19]])
    info = onnx.helper.make_tensor_value_info("x", INT64, rows.shape)
    found = run_one(node, info, rows, {"data": pack(data, 8, columns)[:, 0], "scale": scale})
    np.testing.assert_array_equal(found[0], (data * scale)[rows[0]])


@pytest.mark.parametrize(("columns", "block"), [(64, 64), (160, 32), (704, 64), (2048, 256)])
def test_int8_block_wastes_no_bytes(columns: int, block: int) -> None:
    assert block_size(columns, groups=1) == block
    assert block_size(columns, groups=columns // 32) == 32
