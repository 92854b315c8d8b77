from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from eptq_onnx.graph.native import native


def quantized(values, axis, opset):
    scale = np.linspace(0.5, 2, 1 if axis is None else values.shape[axis], dtype=np.float32)
    constants = {
        "w": values,
        "scale": scale.reshape(() if axis is None else -1),
        "zero": np.zeros(() if axis is None else len(scale), np.int8),
    }
    attributes = {} if axis is None else {"axis": axis}
    node = helper.make_node("DequantizeLinear", list(constants), ["y"], name="dequantize", **attributes)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, values.shape)
    tensors = [numpy_helper.from_array(v, n) for n, v in constants.items()]
    graph = helper.make_graph([node], "weights", [], [output], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


@pytest.mark.parametrize(("width", "opset"), [(4, 21), (2, 25)])
@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("shifted", [False, True])
def test_dequantized_values_are_the_same(width, opset, axis, shifted):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**width, (7, 9))
    count = 1 if axis is None else values.shape[axis]
    along = [1, 1]
    if axis is not None:
        along[axis] = count
    zero = rng.integers(0, 2**width, along) if shifted else 2 ** (width - 1)
    model = quantized((values - zero).astype(np.int8), axis, opset)
    result, left = native(model, [width])
    assert not left
    onnx.checker.check_model(result, full_check=True)
    [weight] = [t for t in result.graph.initializer if t.name == "w"]
    assert len(weight.raw_data) == -(-63 * width // 8)
    expected, got = (np.asarray(*ReferenceEvaluator(m).run(None, {})) for m in (model, result))
    np.testing.assert_array_equal(got, expected)


def test_what_no_type_holds_stays_int8_and_is_told():
    far = (np.arange(32).reshape(2, 16) % 16 + 40).astype(np.int8)
    model = quantized(far, 0, 21)
    result, left = native(model, [4])
    assert left == ["w"]
    assert {t.name: t.data_type for t in result.graph.initializer}["w"] == TensorProto.INT8


def test_weights_of_8_bits_are_no_matter_of_notes():
    values = np.arange(-64, 64).reshape(2, 64).astype(np.int8)
    assert native(quantized(values, None, 21), [4])[1] == []
