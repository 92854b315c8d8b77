import numpy as np
import pytest
from graphs import normal, parse
from onnx import TensorProto, helper

from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.outputs import comparable, numbers, readable
from eptq_onnx.graph.view import GraphView
from eptq_onnx.runtime import Session

X = normal(2, 3, seed=4)


def model_with(op_type, output, **attributes):
    model = parse("g (float[2,3] x) => (float[2,3] y) { y = Relu (x) }")
    model.graph.node.append(helper.make_node(op_type, ["y"], [output.name], **attributes))
    model.graph.output.append(output)
    return infer_shapes(model)


@pytest.mark.parametrize("elem_type", [TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_tensors_of_every_float_type_are_read_as_float64(elem_type):
    model = model_with("Cast", helper.make_tensor_value_info("z", elem_type, [2, 3]), to=elem_type)
    runnable, names = readable(model)
    values = Session(runnable).run({"x": X}, list(names.values()))
    assert list(names) == ["y", "z"]
    z = numbers(values[names["z"]])
    assert z.dtype == np.float64
    np.testing.assert_allclose(z, np.maximum(X, 0), rtol=1e-2)


def test_sequences_of_floats_are_concatenated():
    model = model_with(
        "SplitToSequence", helper.make_tensor_sequence_value_info("z", TensorProto.FLOAT, None), axis=0
    )
    assert readable(model)[0] is model
    value = Session(model).run({"x": X}, ["z"])["z"]
    np.testing.assert_array_equal(numbers(value), np.maximum(X, 0).reshape(-1))


def test_the_values_of_maps_are_concatenated():
    np.testing.assert_array_equal(
        numbers([{"no": 0.25, "yes": 0.75}, {"no": 1.0, "yes": 0.0}]), [0.25, 0.75, 1, 0]
    )
    assert numbers(None).shape == (0,)


@pytest.mark.parametrize(
    ("op_type", "elem_type", "attributes"),
    [("Shape", TensorProto.INT64, {}), ("IsNaN", TensorProto.BOOL, {})],
)
def test_outputs_of_other_types_are_not_compared(op_type, elem_type, attributes):
    model = model_with(op_type, helper.make_tensor_value_info("z", elem_type, None), **attributes)
    assert comparable(GraphView(model)) == ("y",)
    with pytest.raises(TypeError):
        numbers(Session(model).run({"x": X}, ["z"])["z"])


def test_an_output_that_is_listed_twice_is_compared_once():
    model = parse("g (float[2,3] x) => (float[2,3] y) { y = Relu (x) }")
    model.graph.output.append(model.graph.output[0])
    assert comparable(GraphView(model)) == ("y",)
