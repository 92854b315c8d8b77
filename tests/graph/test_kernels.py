"""Faster forms compute the same; what has none stays as it is."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import normal, parse

from eptq_onnx.graph.kernels import faster, fits_blocks
from eptq_onnx.runtime import LAYOUT_DOMAIN, Session, channel_block

needs_blocks = pytest.mark.skipif(not channel_block(), reason="onnxruntime has no blocked layout on this machine")


def _agrees(model, feeds):
    result = faster(model)
    expected, found = (Session(m).run(feeds) for m in (model, result))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4)
    return result


def _blocked(model) -> int:
    return sum(node.op_type == "Conv" and node.domain == LAYOUT_DOMAIN for node in model.graph.node)


@needs_blocks
@pytest.mark.parametrize("attributes", ["", ", strides = [2, 1], pads = [1, 1, 0, 2]", ", dilations = [2, 2]"])
def test_a_depthwise_conv_with_a_computed_weight(attributes):
    model = parse(
        f"g (float[3,32,9,8] x, float[32,1,3,3] w, float[32] b) => (float[N,C,H,W] y, float[N,C,H,W] r) {{ h = Relu (x)"
        f"  y = Conv <group = 32{attributes}> (h, w, b)  z = Conv <group = 32{attributes}> (h, w)  r = Relu (z) }}"
    )
    result = _agrees(model, {"x": normal(3, 32, 9, 8), "w": normal(32, 1, 3, 3, seed=1), "b": normal(32, seed=2)})
    assert _blocked(result) == 2
    # The image and the weight are put in blocks once.
    assert sum(node.op_type == "ReorderInput" for node in result.graph.node) == 2


@needs_blocks
def test_images_side_by_side_are_put_in_blocks_as_they_were():
    """The gradient of a depthwise weight."""
    model = parse(
        "g (float[3,32,6,6] x, float[3,32,4,4] dy, float[32,1,3,3] w) => (float[N,C,H,W] y, float[K,L,H,W] dw)"
        "{ y = Conv <group = 32> (x, w)  a = Reshape (x, side)  b = Reshape (dy, behind)  dw = Conv <group = 96> (a, b) }",
        {"side": np.array([1, 96, 6, 6]), "behind": np.array([96, 1, 4, 4])},
    )
    result = _agrees(model, {"x": normal(3, 32, 6, 6), "dy": normal(3, 32, 4, 4, seed=1), "w": normal(32, 1, 3, 3, seed=2)})
    assert _blocked(result) == 2
    assert sum(node.op_type == "ReorderInput" for node in result.graph.node) == 3


@pytest.mark.parametrize(
    ("channels", "weight", "group"),
    [(30, (30, 1, 3, 3), 30), (32, (64, 1, 3, 3), 32), (32, (32, 2, 3, 3), 16), (32, (32, 32, 3, 3), 1)],
    ids=["no whole blocks", "multiplier", "grouped", "dense"],
)
def test_other_convolutions_stay(channels, weight, group):
    size = ",".join(map(str, weight))
    model = parse(f"g (float[2,{channels},5,5] x, float[{size}] w) => (float[N,C,H,W] y) {{ y = Conv <group = {group}> (x, w) }}")
    assert _blocked(_agrees(model, {"x": normal(2, channels, 5, 5), "w": normal(*weight)})) == 0
    assert not fits_blocks(weight, group)


def test_a_constant_weight_stays_with_onnxruntime():
    model = parse("g (float[2,32,5,5] x) => (float[N,C,H,W] y) { y = Conv <group = 32> (x, w) }", {"w": normal(32, 1, 3, 3)})
    assert _blocked(_agrees(model, {"x": normal(2, 32, 5, 5)})) == 0


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_sums_of_squares_over_images(opset, keepdims):
    axes, given = ("axes = [2, 3], ", "") if opset < 18 else ("", ", axes")
    model = parse(
        f"g (float[2,5,6,7] x) => (float[N,C] y) {{ d = Neg (x)  y = ReduceSumSquare <{axes}keepdims = {keepdims}> (d{given}) }}",
        {"axes": np.array([-1, 2])} if given else {},
        opset=opset,
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    result = _agrees(model, {"x": normal(2, 5, 6, 7)})
    assert "ReduceSumSquare" not in {node.op_type for node in result.graph.node}


def test_sums_of_squares_over_other_axes_stay():
    model = parse("g (float[2,5,6,7] x) => (float[C] y) { y = ReduceSumSquare <axes = [0, 2, 3], keepdims = 0> (x) }")
    assert "ReduceSumSquare" in {node.op_type for node in _agrees(model, {"x": normal(2, 5, 6, 7)}).graph.node}
