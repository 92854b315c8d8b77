from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import normal, parse
from onnx import ModelProto, TensorProto

from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.narrow import narrow
from eptq_onnx.runtime import Session

NETWORK = """g (float[N,3,8,8] x) => (float[N,4,6,6] y, float[N] m) {
    c = Conv (x, w, b)  s = Sigmoid (c)  p = Mul (c, s)  y = Relu (p)  m = ReduceMax <axes = [1, 2, 3], keepdims = 0> (p)
}"""


def network(opset=17, **constants) -> ModelProto:
    return parse(NETWORK, {"w": normal(4, 3, 3, 3), "b": normal(4), **constants}, opset=opset)


def types(model) -> dict[str, int]:
    found = infer_shapes(model)
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*found.graph.value_info, *found.graph.output)}
    return kinds | {t.name: t.data_type for t in model.graph.initializer}


def test_everything_between_inputs_and_outputs_is_narrow():
    model = network()
    result = narrow(model, TensorProto.FLOAT16, {})
    onnx.checker.check_model(result.model, full_check=True)
    assert (result.narrow, result.wide) == (5, {})
    kinds = types(result.model)
    assert {kinds[n] for n in ("y", "m")} == {TensorProto.FLOAT}
    assert {kinds[n] for n in ("c", "s", "p")} == {TensorProto.FLOAT16}
    assert all(t.data_type != TensorProto.FLOAT for t in result.model.graph.initializer)
    x = normal(2, 3, 8, 8)
    exact, found = Session(model).run({"x": x}), Session(result.model).run({"x": x})
    for name, value in exact.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-2, atol=1e-2)
        assert not np.array_equal(found[name], value)


def test_bfloat16_stays_float32_where_the_opset_lacks_it():
    result = narrow(network(), TensorProto.BFLOAT16, {})
    onnx.checker.check_model(result.model, full_check=True)
    assert result.narrow
    assert "Conv does not support bfloat16 in opset 17" in result.wide.values()
    values = {t.name: t for t in result.model.graph.initializer}
    assert values["w"].data_type == TensorProto.FLOAT


def test_values_beyond_the_range_stay_float32():
    result = narrow(network(), TensorProto.FLOAT16, {"p": 1e5})
    onnx.checker.check_model(result.model, full_check=True)
    assert {n.op_type for n in result.model.graph.node if n.output[0] in result.wide} == {
        "Mul",
        "Relu",
        "ReduceMax",
    }
    assert set(result.wide.values()) == {"values of p exceed the range of float16"}
    large = 60 * normal(2, 3, 8, 8)
    model = network(w=100 * normal(4, 3, 3, 3))
    exact = Session(model).run({"x": large})
    largest = {"c": float(np.abs(exact["y"]).max()), "p": float(np.abs(exact["y"]).max())}
    found = Session(narrow(model, TensorProto.FLOAT16, largest).model).run({"x": large})
    assert np.isfinite(found["y"]).all()


@pytest.mark.parametrize("value", [1e-9, 1e6])
def test_constants_that_the_type_does_not_hold_keep_their_operator_float32(value):
    model = parse("g (float[4] x) => (float[4] y) { a = Add (x, k)  y = Sqrt (a) }", {"k": np.float32(value)})
    result = narrow(model, TensorProto.FLOAT16, {})
    assert [n.op_type for n in result.model.graph.node if n.output[0] in result.wide] == ["Add"]
    x = np.zeros(4, np.float32)
    np.testing.assert_allclose(
        Session(result.model).run({"x": x})["y"], Session(model).run({"x": x})["y"], rtol=1e-2
    )


def test_quantizers_stay_float32():
    text = """g (float[4] x) => (float[4] y) {
        q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z)  r = Sin (d)  h = Neg (r)
        p = QuantizeLinear (h, s, z)  y = DequantizeLinear (p, s, z)
    }"""
    scales: dict[str, np.generic] = {"s": np.float32(0.02), "z": np.uint8(3)}
    result = narrow(parse(text, scales), TensorProto.FLOAT16, {})
    onnx.checker.check_model(result.model, full_check=True)
    assert (result.narrow, result.wide) == (2, {})
    kinds = types(result.model)
    assert {kinds[n] for n in ("s", "d", "h")} == {TensorProto.FLOAT}
    assert kinds["r"] == TensorProto.FLOAT16


def test_a_subgraph_reads_float32():
    text = """g (float[4] x, bool c) => (float[4] y) {
        a = Sqrt (x)
        y = If (c) <then_branch = t () => (float[4] u) { u = Exp (a) }, else_branch = e () => (float[4] v) { v = Neg (a) }>
    }"""
    model = parse(text, {})
    result = narrow(model, TensorProto.FLOAT16, {})
    onnx.checker.check_model(result.model, full_check=True)
    assert list(result.wide.values()) == ["If has subgraphs"]
    x, c = np.array([1, 2, 3, 4], np.float32), np.array(True)
    np.testing.assert_allclose(
        Session(result.model).run({"x": x, "c": c})["y"], Session(model).run({"x": x, "c": c})["y"], rtol=1e-2
    )


def test_large_counts_stay_exact():
    text = "g (int64[1] n) => (int64[1] y) { f = Cast <to = 1> (n)  h = Floor (f)  y = Cast <to = 7> (h) }"
    n = {"n": np.array([4097], np.int64)}
    largest = {"f": 4097.0, "h": 4097.0}
    result = narrow(parse(text, {}), TensorProto.FLOAT16, largest)
    assert Session(result.model).run(n)["y"][0] == 4097
