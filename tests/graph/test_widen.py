from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import images, parse, small_convnet
from onnx import TensorProto, numpy_helper

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.graph.view import GraphView
from eptq_onnx.graph.widen import other_float_types, widen
from eptq_onnx.runtime import Session


def narrowed(model: onnx.ModelProto, elem_type: int) -> onnx.ModelProto:
    """Return the model in another float type, including its inputs and outputs."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(elem_type)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for node in list(model.graph.node):
        if node.op_type == "Constant":
            value = np.array(node.attribute[0].f, dtype)
            node.attribute[0].CopyFrom(onnx.helper.make_attribute("value", numpy_helper.from_array(value)))
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.elem_type = elem_type
    return model


@pytest.mark.parametrize("elem_type", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_a_model_of_another_float_type_is_quantized_and_keeps_its_interface(elem_type):
    model, dtype = narrowed(small_convnet(), elem_type), onnx.helper.tensor_dtype_to_np_dtype(elem_type)
    before = model.SerializeToString()
    result = eptq_onnx.quantize(model, images(16).astype(dtype), Config(preset="fast"))
    assert model.SerializeToString() == before
    onnx.checker.check_model(result.model, full_check=True)
    assert result.model.graph.input[0].type.tensor_type.elem_type == elem_type
    assert result.model.graph.output[0].type.tensor_type.elem_type == elem_type
    assert len(result.report.layers) == 4
    assert any("computed and stored in float32" in note for note in result.report.notes)
    x = images(8, seed=1)
    expected = Session(small_convnet()).run({"image": x})["logits"]
    got = Session(result.model).run({"image": x.astype(dtype)})["logits"]
    assert got.dtype == dtype
    assert np.abs(got - expected).mean() < 0.05 * np.abs(expected).mean()


def test_casts_constants_and_subgraphs_follow():
    model = parse(
        """
        g (float[N,3] x, bool flag) => (float16[N,3] y, float[N,3] z) {
            h = Cast <to = 10> (x)
            y = If (flag) <
                then_branch = a () => (float16[N,3] t) { t = Mul (h, c) },
                else_branch = b () => (float16[N,3] u) { k = Cast <to = 10> (x)  u = Neg (k) }
            >
            z = Cast <to = 1> (y)
        }
        """,
        {"c": np.float16(2)},
    )
    assert other_float_types(model) == ("float16",)
    wide = widen(model)
    onnx.checker.check_model(wide, full_check=True)
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    for flag in (True, False):
        expected, got = (Session(m).run({"x": x, "flag": np.array(flag)}) for m in (model, wide))
        assert got["y"].dtype == np.float16
        np.testing.assert_allclose(got["y"], expected["y"], rtol=2e-3)
        np.testing.assert_allclose(got["z"], expected["z"], rtol=2e-3)


def test_a_float32_model_is_left_alone():
    model = small_convnet()
    assert other_float_types(model) == ()
    assert widen(model) == model
    assert GraphView(widen(model)).outputs == ("logits",)


def test_the_lowest_double_stays_finite():
    model = parse(
        "g (double[N,3] x) => (double[N,3] y) { y = Add (x, fill) }",
        {"fill": np.array([np.finfo(np.float64).min, -np.inf, 1.0])},
    )
    fill = GraphView(widen(model)).constant("fill")
    np.testing.assert_array_equal(fill, np.array([np.finfo(np.float32).min, -np.inf, 1], np.float32))
