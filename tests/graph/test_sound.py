"""Tests that damaged models are accepted if onnxruntime runs them, and otherwise refused in one sentence."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import images, normal, parse, small_convnet
from onnx import ModelProto, TensorProto, helper

import eptq_onnx
from eptq_onnx import Config, EptqError, ModelError
from eptq_onnx.graph import io
from eptq_onnx.probes import newest_readable
from eptq_onnx.runtime import Session

FAST = Config(preset="fast", measure_speed=False)


def conv1d() -> ModelProto:
    body = (
        "g (float[N,2,8] x) => (float[N,3,8] y) "
        "{ c = Conv <pads = [1,1], strides = [1]> (x, w) r = Relu (c) y = Conv (r, v) }"
    )
    return parse(body, {"w": normal(4, 2, 3), "v": normal(3, 4, 1)})


def _dims(model: ModelProto, *dims: int) -> None:
    model.graph.initializer[0].dims[:] = dims


def _ints(model: ModelProto, name: str, *values: int) -> None:
    next(a for a in model.graph.node[0].attribute if a.name == name).ints[:] = values


def _shape(model: ModelProto, *dims: int) -> None:
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, dims))


def _unknown(model: ModelProto) -> None:
    """An axis too many, behind what onnx's inference does not know and stops at."""
    _dims(model, 1, 4, 2, 3)
    model.graph.node[1].op_type, model.ir_version = "/../x", 2


DEADLY = {
    "an axis too few": lambda m: _dims(m, 8, 3),
    "an axis too many": lambda m: _dims(m, 1, 4, 2, 3),
    "stride 0": lambda m: _ints(m, "strides", 0),
    "an input of two axes": lambda m: _shape(m, 4, 8),
    "an axis too many behind an unknown operator": _unknown,
}


@pytest.mark.parametrize("fault", DEADLY)
def test_models_that_crash_the_process_are_refused(fault):
    model = conv1d()
    DEADLY[fault](model)
    with pytest.raises(ModelError, match="the model"):
        io.load(model)


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
@pytest.mark.parametrize("newer", [1, 2])
@pytest.mark.parametrize("fault", ["an axis too few", "an axis too many", "stride 0"])
def test_models_that_would_crash_the_process_once_their_opset_is_lowered_are_refused(fault, newer, domain):
    model = conv1d()
    DEADLY[fault](model)
    model.opset_import[0].domain, model.opset_import[0].version = domain, newest_readable()[0] + newer
    with pytest.raises(EptqError):
        eptq_onnx.quantize(model, {"x": normal(8, 2, 8)}, FAST)


@pytest.mark.parametrize("seed", range(4))
def test_inconsistent_types_are_refused(seed):
    rng = np.random.default_rng(seed)
    model = small_convnet()
    tensor = model.graph.initializer[int(rng.integers(len(model.graph.initializer)))]
    kind = int(rng.choice([TensorProto.FLOAT16, TensorProto.INT32, TensorProto.BFLOAT16, TensorProto.BOOL]))
    widths: dict[int, int] = {TensorProto.INT32: 4, TensorProto.BOOL: 1}
    width = widths.get(kind, 2)
    tensor.raw_data, tensor.data_type = bytes(width * (len(tensor.raw_data) // 4)), kind
    with pytest.raises(ModelError):
        eptq_onnx.quantize(model, {"image": images(6)}, FAST)


BODY = """g (float[N,4] x) => (float[N,4] y) <float[N,4] h> {
    h = MatMul (x, w) s = ReduceMean <keepdims = 0> (x) p = Greater (s, zero)
    z = If (p) <
        then_branch = t () => (float[N,4] a) { a = Relu (h) },
        else_branch = e () => (float[N,4] b) { b = MatMul (h, w) }
    >
    y = MatMul (z, v) }"""


def branching() -> ModelProto:
    return parse(BODY, {"w": normal(4, 4), "v": normal(4, 4, seed=1), "zero": np.float32(0)})


@pytest.mark.parametrize("place", ["a", "b", "y", "h"])
@pytest.mark.parametrize("dims", [["N"], ["N", 4, 3], ["N", 2**31 - 1], [1, 1, 1, 1]], ids=str)
def test_wrong_declared_shapes_are_ignored(place, dims):
    model = branching()
    bodies = {a.name: a.g for a in model.graph.node[3].attribute}
    infos = {"a": bodies["then_branch"].output[0], "b": bodies["else_branch"].output[0]}
    infos |= {"y": model.graph.output[0], "h": model.graph.value_info[0]}
    infos[place].CopyFrom(helper.make_tensor_value_info(place, TensorProto.FLOAT, dims))
    x = normal(8, 4, seed=3)
    expected = Session(model).run({"x": x[:1]})
    result = eptq_onnx.quantize(model, {"x": x}, FAST)
    got = Session(result.model).run({"x": x[:1]})
    np.testing.assert_allclose(got["y"], expected["y"], atol=0.2)


def test_attribute_references_outside_functions_are_ignored():
    model = small_convnet()
    for node in model.graph.node:
        for attribute in node.attribute:
            attribute.ref_attr_name = "r"
    assert eptq_onnx.quantize(model, {"image": images(6)}, FAST).report.layers


def test_models_that_onnx_rejects_and_onnxruntime_runs_are_accepted():
    model = conv1d()
    _ints(model, "pads", -1, 3)
    try:
        Session(model)
    except ModelError:
        pytest.skip("this onnxruntime refuses negative pads, too")
    result = eptq_onnx.quantize(model, {"x": normal(6, 2, 8)}, FAST)
    assert len(result.report.layers) == 2


@pytest.mark.parametrize("ir_version", range(8, onnx.IR_VERSION + 1))
def test_the_written_ir_version_is_one_that_loads(ir_version):
    model = small_convnet()
    model.ir_version = ir_version
    result = eptq_onnx.quantize(model, {"image": images(6)}, FAST)
    assert result.model.ir_version == min(ir_version, newest_readable()[1])
    Session(result.model)


@pytest.mark.parametrize("typed", [True, False])
def test_an_input_that_is_an_output_is_quantized_for_its_readers_only(typed):
    model = parse(
        "g (float[N,6] x) => (float[N,4] y) { h = Gemm (x, w) r = Relu (h) y = Gemm (r, v) }",
        {"w": normal(6, 8), "v": normal(8, 4)},
    )
    output = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 6])
    model.graph.output.append(output if typed else onnx.ValueInfoProto(name="x"))
    x = normal(8, 6, seed=2)
    result = eptq_onnx.quantize(model, {"x": x}, FAST)
    np.testing.assert_array_equal(Session(result.model).run({"x": x})["x"], x)


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("name", ["w1", "b2"])
def test_a_layer_with_an_infinite_constant_stays_float(value, name):
    model = small_convnet()
    tensor = next(t for t in model.graph.initializer if t.name == name)
    constant = onnx.numpy_helper.to_array(tensor).copy()
    constant.reshape(-1)[0] = value
    tensor.CopyFrom(onnx.numpy_helper.from_array(constant, name))
    result = eptq_onnx.quantize(_clipped(model), {"image": images(8)}, FAST)
    assert any("has NaN or Inf" in kept.reason for kept in result.report.kept_float)


def _clipped(model: ModelProto) -> ModelProto:
    """Replace Relu by Clip, so that infinite values end there."""
    for node in model.graph.node:
        if node.op_type == "Relu":
            node.op_type = "Clip"
            node.input.extend(["zero", "six"])
    return model


@pytest.mark.parametrize("steps", [0, 2])
def test_branches_that_depend_on_the_sample_are_passed_by(steps):
    config = Config(preset="fast", measure_speed=False, steps=steps) if steps else FAST
    x = np.concatenate([normal(12, 4, seed=3) - 2, normal(12, 4, seed=4) + 2])
    result = eptq_onnx.quantize(branching(), {"x": x}, config)
    assert any("different branches" in kept.reason for kept in result.report.kept_float)
