from __future__ import annotations

import pytest
from graphs import normal, parse

from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.view import GraphView
from eptq_onnx.ops.sizes import SIZES, objection
from eptq_onnx.targets import Operator

CONV = {
    "input_channels": 6,
    "output_channels": 4,
    "groups": 2,
    "group_divisor": 1,
    "kernel": 3,
    "rank": 4,
}
PRODUCT = {"groups": 1, "M": 5, "K": 7, "N": 3, "rank": 2}
CASES = {
    "conv": (
        "g (float[N,6,8,8] x) => (float[N,4,h,k] y) { y = Conv <group = 2> (x, w) }",
        (4, 3, 3, 5),
        CONV,
    ),
    "transposed": (
        "g (float[N,6,8,8] x) => (float[N,4,h,k] y) { y = ConvTranspose <group = 2> (x, w) }",
        (6, 2, 3, 5),
        CONV,
    ),
    "gemm": ("g (float[5,7] x) => (float[5,3] y) { y = Gemm (x, w) }", (7, 3), PRODUCT),
    "gemm, transposed": (
        "g (float[7,5] x) => (float[5,3] y) { y = Gemm <transA = 1, transB = 1> (x, w) }",
        (3, 7),
        PRODUCT,
    ),
    "matmul": (
        "g (float[2,5,7] x) => (float[2,5,3] y) { y = MatMul (x, w) }",
        (7, 3),
        {**PRODUCT, "rank": 3},
    ),
    "groups of eight": (
        "g (float[N,16,8,8] x) => (float[N,24,h,k] y) { y = Conv <group = 2> (x, w) }",
        (24, 8, 1, 1),
        {
            "input_channels": 16,
            "output_channels": 24,
            "groups": 2,
            "group_divisor": 4,
            "kernel": 1,
            "rank": 4,
        },
    ),
    "depthwise": (
        "g (float[N,3,8,8] x) => (float[N,3,h,k] y) { y = Conv <group = 3> (x, w) }",
        (3, 1, 3, 3),
        {"input_channels": 3, "output_channels": 3, "groups": 3, "kernel": 3, "rank": 4},
    ),
    "mean with pads": (
        "g (float[N,3,8,8] x) => (float[N,3,h,k] y)"
        " { y = AveragePool <kernel_shape = [3,3], pads = [1,0,1,1], count_include_pad = 1> (x) }",
        (1,),
        {"groups": 1, "rank": 4, "counted_pads": 3},
    ),
    "mean without pads": (
        "g (float[N,3,8,8] x) => (float[N,3,h,k] y)"
        " { y = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1]> (x) }",
        (1,),
        {"groups": 1, "rank": 4, "counted_pads": 0},
    ),
    "mean with pads as needed": (
        "g (float[N,3,8,8] x) => (float[N,3,h,k] y)"
        ' { y = AveragePool <kernel_shape = [3,3], auto_pad = "SAME_UPPER", count_include_pad = 1> (x) }',
        (1,),
        {"groups": 1, "rank": 4, "counted_pads": 1},
    ),
    "unknown rows": (
        "g (float[N,7] x) => (float[N,3] y) { y = MatMul (x, w) }",
        (7, 3),
        {k: v for k, v in PRODUCT.items() if k != "M"},
    ),
}


@pytest.mark.parametrize(("text", "shape", "sizes"), CASES.values(), ids=CASES)
def test_sizes_are_measured(text, shape, sizes):
    model = infer_shapes(parse(text, {"w": normal(*shape)}))
    view, node = GraphView(model), model.graph.node[0]
    assert {n: s for n, f in SIZES.items() if (s := f(node, view)) is not None} == sizes
    for name, size in sizes.items():
        assert objection(node, view, Operator(runs="layer", least={name: size}, most={name: size})) is None
        for field, limit, word in (("least", size + 1, "at least"), ("most", size - 1, "at most")):
            told = objection(node, view, Operator(runs="layer", **{field: {name: limit}}))
            assert told is not None
            assert told.endswith(f"is {size}, but the target takes {word} {limit}")
    for name in SIZES.keys() - sizes.keys():
        assert objection(node, view, Operator(runs="layer", least={name: 1000}, most={name: 0})) is None
