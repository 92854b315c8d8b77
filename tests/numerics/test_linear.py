"""Layers as matrix products: rows of inputs times rows of weights equal onnxruntime's results."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import normal, parse

from eptq_onnx.errors import ModelError
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.linear import ConvForm, OutputsApart
from eptq_onnx.ops import spec_of
from eptq_onnx.runtime import Session

CASES = {
    "conv": ("Conv <strides = [2,1], pads = [1,0,2,1], dilations = [1,2]>", (2, 4, 9, 8), (6, 4, 3, 2)),
    "grouped": ("Conv <group = 2, pads = [1,1,1,1]>", (2, 4, 5, 5), (6, 2, 3, 3)),
    "depthwise": ("Conv <group = 4, strides = [2,2]>", (2, 4, 7, 7), (8, 1, 3, 3)),
    "same upper": ('Conv <auto_pad = "SAME_UPPER", strides = [2,2]>', (2, 3, 7, 8), (5, 3, 3, 2)),
    "same lower": ('Conv <auto_pad = "SAME_LOWER", strides = [2,3]>', (2, 3, 7, 8), (5, 3, 4, 2)),
    "valid": ('Conv <auto_pad = "VALID">', (2, 3, 5, 5), (5, 3, 3, 3)),
    "conv 1-D": ("Conv <pads = [2,2], dilations = [2]>", (3, 4, 11), (5, 4, 3)),
    "conv 3-D": ("Conv <pads = [1,1,1,1,1,1]>", (1, 2, 4, 4, 3), (3, 2, 3, 3, 3)),
    "transposed": (
        "ConvTranspose <strides = [2,3], pads = [1,0,0,1], output_padding = [1,0]>",
        (2, 4, 5, 4),
        (4, 3, 3, 4),
    ),
    "transposed, grouped": (
        "ConvTranspose <strides = [2,2], group = 2, dilations = [1,2]>",
        (2, 4, 3, 4),
        (4, 3, 2, 2),
    ),
    "transposed, cropped": ("ConvTranspose <strides = [2,2], pads = [3,3,3,3]>", (1, 2, 6, 6), (2, 3, 3, 3)),
    "gemm": ("Gemm <alpha = 0.5>", (7, 4), (4, 3)),
    "gemm, transposed": ("Gemm <transB = 1>", (7, 4), (3, 4)),
    "matmul": ("MatMul", (2, 5, 4), (4, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_times_weights_is_the_operator(case):
    call, x_shape, w_shape = CASES[case]
    op, _, attributes = call.partition(" ")
    dims = ",".join(map(str, x_shape))
    model = parse(
        f"g (float[{dims}] x) => (float y) {{ y = {op} {attributes} (x, w) }}",
        {"w": normal(*w_shape, seed=1)},
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    x, view = normal(*x_shape), GraphView(model)
    node = model.graph.node[0]
    linear = spec_of(node).linear
    assert linear is not None
    form = linear(node, view)
    assert form is not None
    y = Session(model).run({"x": x})["y"]
    rows = form.input_rows(x, np.arange(form.positions(x.shape)))
    weight = form.weight_rows(view.constant("w"))
    groups = [
        np.moveaxis(part, _output_axis(node), -1).reshape(-1, weight.shape[1])
        for part in _groups(y, node, len(weight))
    ]
    np.testing.assert_allclose(np.matmul(rows, weight.swapaxes(1, 2)), np.stack(groups), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(form.weight_from_rows(weight), view.constant("w"))
    apart = OutputsApart(form, weight.shape[1])
    assert apart.weight_rows(view.constant("w")).shape == (len(weight) * weight.shape[1], 1, weight.shape[2])
    np.testing.assert_array_equal(
        apart.weight_from_rows(apart.weight_rows(view.constant("w"))), view.constant("w")
    )


def _output_axis(node) -> int:
    axis = spec_of(node).output_axis
    assert axis is not None
    return axis


def _groups(y: np.ndarray, node, count: int) -> list[np.ndarray]:
    return np.split(y, count, axis=_output_axis(node))


def test_what_is_no_plain_matrix_product_has_no_form():
    stacked = parse("g (float[2,3,4] x) => (float[2,3,5] y) { y = MatMul (x, w) }", {"w": normal(2, 4, 5)})
    sized = parse(
        "g (float[1,2,4,4] x) => (float[1,3,9,9] y) {"
        " y = ConvTranspose <output_shape = [9,9], strides=[2,2]> (x, w) }",
        {"w": normal(2, 3, 3, 3)},
    )
    for model in (stacked, sized):
        node = model.graph.node[0]
        linear = spec_of(node).linear
        assert linear is not None
        assert linear(node, GraphView(model)) is None


@pytest.mark.parametrize("stride", [2**62, -(2**63)])
@pytest.mark.parametrize(("size", "shape"), [(5, "5"), (8, "8,8")])
def test_strides_that_lead_nowhere_leave_one_position(stride, size, shape):
    rank = shape.count(",") + 1
    weight = normal(3, 2, *(3,) * rank)
    strides = ",".join([str(stride)] * rank)
    model = parse(
        f"g (float[2,2,{shape}] x) => (float[2,3,{','.join('1' * rank)}] y) {{ y = Conv <strides = [{strides}]> (x, w) }}",
        {"w": weight},
    )
    x = normal(2, 2, *(size,) * rank, seed=3)
    node = model.graph.node[0]
    linear = spec_of(node).linear
    assert linear is not None
    form = linear(node, GraphView(model))
    assert form is not None
    assert form.positions(x.shape) == 2
    rows = form.input_rows(x, np.arange(2))
    try:
        y = Session(model).run({"x": x})["y"]
    except ModelError:
        pytest.skip("this onnxruntime refuses such strides")
    product = np.matmul(rows, form.weight_rows(weight).swapaxes(1, 2))
    np.testing.assert_allclose(product.reshape(2, 3), y.reshape(2, 3), rtol=1e-4, atol=1e-5)


def test_no_rows_have_the_shape_of_rows():
    form = ConvForm((3,), (1,), (1,), None)
    assert form.input_rows(np.zeros((2, 4, 8), np.float32), np.zeros(0, np.int64)).shape == (1, 0, 12)
