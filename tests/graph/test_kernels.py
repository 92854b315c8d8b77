"""Tests that faster forms compute the same, and that nodes without one are unchanged."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import normal, parse

from eptq_onnx.graph.kernels import faster, fits_blocks
from eptq_onnx.probes import channel_block
from eptq_onnx.runtime import LAYOUT_DOMAIN, Session

needs_blocks = pytest.mark.skipif(
    not channel_block(), reason="onnxruntime has no blocked layout on this machine"
)


def _agrees(model, feeds):
    result = faster(model)
    expected, found = (Session(m).run(feeds) for m in (model, result))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4)
    return result


def _blocked(model) -> int:
    return sum(node.op_type == "Conv" and node.domain == LAYOUT_DOMAIN for node in model.graph.node)


@needs_blocks
@pytest.mark.parametrize(
    "attributes", ["", ", strides = [2, 1], pads = [1, 1, 0, 2]", ", dilations = [2, 2]"]
)
def test_a_depthwise_conv_with_a_computed_weight(attributes):
    model = parse(
        "g (float[3,32,9,8] x, float[32,1,3,3] w, float[32] b) => (float[N,C,H,W] y, float[N,C,H,W] r)"
        f" {{ h = Relu (x)  y = Conv <group = 32{attributes}> (h, w, b)"
        f"  z = Conv <group = 32{attributes}> (h, w)  r = Relu (z) }}"
    )
    result = _agrees(
        model, {"x": normal(3, 32, 9, 8), "w": normal(32, 1, 3, 3, seed=1), "b": normal(32, seed=2)}
    )
    assert _blocked(result) == 2
    # The image and the weight are each reordered once.
    assert sum(node.op_type == "ReorderInput" for node in result.graph.node) == 2


@needs_blocks
def test_reshapes_that_merge_samples_and_channels_stay_in_blocks():
    """As in the gradient of a depthwise weight."""
    model = parse(
        "g (float[3,32,6,6] x, float[3,32,4,4] dy, float[32,1,3,3] w)"
        " => (float[N,C,H,W] y, float[K,L,H,W] dw)"
        " { y = Conv <group = 32> (x, w)  a = Reshape (x, side)  b = Reshape (dy, behind)"
        "  dw = Conv <group = 96> (a, b) }",
        {"side": np.array([1, 96, 6, 6]), "behind": np.array([96, 1, 4, 4])},
    )
    result = _agrees(
        model, {"x": normal(3, 32, 6, 6), "dy": normal(3, 32, 4, 4, seed=1), "w": normal(32, 1, 3, 3, seed=2)}
    )
    assert _blocked(result) == 2
    assert sum(node.op_type == "ReorderInput" for node in result.graph.node) == 3


@pytest.mark.parametrize(
    ("channels", "weight", "group"),
    [(30, (30, 1, 3, 3), 30), (32, (64, 1, 3, 3), 32), (32, (32, 2, 3, 3), 16), (32, (32, 32, 3, 3), 1)],
    ids=["no whole blocks", "multiplier", "grouped", "dense"],
)
def test_other_convolutions_stay(channels, weight, group):
    size = ",".join(map(str, weight))
    model = parse(
        f"g (float[2,{channels},5,5] x, float[{size}] w) => (float[N,C,H,W] y)"
        f" {{ y = Conv <group = {group}> (x, w) }}"
    )
    assert _blocked(_agrees(model, {"x": normal(2, channels, 5, 5), "w": normal(*weight)})) == 0
    assert not fits_blocks(weight, group)


@needs_blocks
@pytest.mark.parametrize(("first", "second"), [(3, 32), (12, 36), (20, 64), (32, 20)])
def test_constant_convolutions_stay_in_blocks(first, second):
    """This includes channels that do not fill a block: onnxruntime would leave the blocks for the Clip."""
    model = parse(
        f"g (float[2,{first},9,8] x) => (float[N,C,H,W] y)"
        " { a = Conv <pads = [1, 1, 1, 1]> (x, w, b)  c = Clip (a, low, high)"
        "  d = Conv <strides = [2, 2]> (c, v)  e = Sigmoid (d)  f = Mul (d, e)  y = Conv (f, u) }",
        {
            "w": normal(32, first, 3, 3),
            "b": normal(32),
            "v": normal(second, 32, 1, 1),
            "u": normal(8, second, 2, 1),
        }
        | {"low": np.float32(0), "high": np.float32(0.5)},
    )
    result = _agrees(model, {"x": normal(2, first, 9, 8)})
    assert _blocked(result) == 3
    assert [node.op_type for node in result.graph.node].count("ReorderInput") == (
        1 if first >= channel_block() else 0
    )
    assert [node.op_type for node in result.graph.node].count("ReorderOutput") == 1


@needs_blocks
def test_a_loss_is_computed_in_blocks():
    """All kinds of nodes in between: pools, concatenations, factors per channel and sample, masks, sums."""
    model = parse(
        "g (float[2,32,8,8] x, float[32,1,3,3] w, float[64,1,3,3] v, float[2,64,1,1] f)"
        " => (float[N,C,H,W] y, float[N,C] squares, float[C] total, float[N,C,H,W] mean) {"
        " a = Conv <group = 32, pads = [1, 1, 1, 1]> (x, w)"
        " m = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (a)"
        " c = Concat <axis = 1> (a, m)  r = Clip (c, zero, one)"
        " same = Equal (c, r)  kept = Cast <to = 1> (same)"
        " g = Mul (kept, f)  s = Sum (g, r, c)  mean = GlobalAveragePool (s)"
        " squares = ReduceSumSquare <axes = [2, 3], keepdims = 0> (s)"
        " total = ReduceSum <keepdims = 0> (s, axes)"
        " y = Conv <group = 64> (s, v) }",
        {"zero": np.float32(0), "one": np.float32(1), "axes": np.array([0, 2, 3])},
    )
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    feeds = {
        "x": normal(2, 32, 8, 8),
        "w": normal(32, 1, 3, 3),
        "v": normal(64, 1, 3, 3),
        "f": normal(2, 64, 1, 1),
    }
    result = _agrees(model, feeds)
    kinds = [node.op_type for node in result.graph.node]
    # In: the image and two weights; out: the result and the means.
    assert (kinds.count("ReorderInput"), kinds.count("ReorderOutput")) == (3, 2)
    assert not {"ReduceSumSquare"} & set(kinds)


@needs_blocks
def test_tensors_that_are_read_in_both_layouts_are_reordered_once():
    model = parse(
        "g (float[2,32,5,5] x, float[32,1,3,3] w)"
        " => (float[N,H,W,C] y, float[N,M,H,W] z, float[2,32,5,5] h) { h = Relu (x)"
        "  a = Conv <group = 32> (h, w)  b = Sin (a)  y = Transpose <perm = [0, 2, 3, 1]> (a)  z = Tan (b) }"
    )
    result = _agrees(model, {"x": normal(2, 32, 5, 5), "w": normal(32, 1, 3, 3)})
    kinds = [node.op_type for node in result.graph.node]
    assert (kinds.count("ReorderInput"), kinds.count("ReorderOutput")) == (2, 1)


def test_nothing_changes_without_a_convolution():
    model = parse(
        "g (float[2,32,5,5] x) => (float[N,C,H,W] y) "
        "{ r = Relu (x)  p = MaxPool <kernel_shape = [2, 2]> (r)  y = Add (p, p) }"
    )
    assert [n.op_type for n in _agrees(model, {"x": normal(2, 32, 5, 5)}).graph.node] == [
        "Relu",
        "MaxPool",
        "Add",
    ]


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_sums_of_squares_over_images(opset, keepdims):
    axes, given = ("axes = [2, 3], ", "") if opset < 18 else ("", ", axes")
    model = parse(
        "g (float[2,5,6,7] x) => (float[N,C] y) "
        f"{{ d = Neg (x)  y = ReduceSumSquare <{axes}keepdims = {keepdims}> (d{given}) }}",
        {"axes": np.array([-1, 2])} if given else {},
        opset=opset,
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    result = _agrees(model, {"x": normal(2, 5, 6, 7)})
    assert "ReduceSumSquare" not in {node.op_type for node in result.graph.node}


def test_sums_of_squares_over_other_axes_stay():
    model = parse(
        "g (float[2,5,6,7] x) => (float[C] y) { y = ReduceSumSquare <axes = [0, 2, 3], keepdims = 0> (x) }"
    )
    assert "ReduceSumSquare" in {
        node.op_type for node in _agrees(model, {"x": normal(2, 5, 6, 7)}).graph.node
    }
