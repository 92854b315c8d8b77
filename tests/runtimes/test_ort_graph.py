"""What the nodes of an optimized graph stand for, with graphs that onnxruntime has optimized on this machine."""

from __future__ import annotations

import pytest
from graphs import images, normal, parse, silent, small_convnet

import eptq_onnx
from eptq_onnx import Config, runtimes
from eptq_onnx.runtimes import speed
from eptq_onnx.runtimes.base import CONVERSIONS
from eptq_onnx.runtimes.ort_graph import Origins, kernels, stands_for


@pytest.fixture(scope="module")
def quantized():
    config = Config(preset="fast", measure_speed=False)
    return eptq_onnx.quantize(small_convnet(), images(8), config, progress=silent).model


@pytest.mark.parametrize(
    ("kernel", "operator"),
    [("QLinearConv", "Conv"), ("FusedConv", "Conv"), ("QGemm", "Gemm"), ("QLinearSigmoid", "Sigmoid"),
     ("MatMulIntegerToFloat", "MatMul"), ("QLinearGlobalAveragePool", "GlobalAveragePool"),
     ("NhwcMaxPool", "MaxPool"), ("QuickGelu", "QuickGelu"), ("Softmax", "Softmax"), ("ReorderOutput", "layout")],
)  # fmt: skip
def test_kernels_go_by_the_operator_that_they_stand_for(kernel, operator):
    assert stands_for(kernel) == operator


def test_quantizers_are_called_after_the_operators_around_them():
    graph = parse(
        "g (float[1,2,4,4] x, float s) => (float[1,2,4,4] y) {"
        " xq = QuantizeLinear (x, s)  xd = DequantizeLinear (xq, s)  r = Resize (xd, s, s)"
        "  rq = QuantizeLinear (r, s)"
        " rd = DequantizeLinear (rq, s)  a = Softmax (rd)  b = Erf (rd)  c = Add (a, b)"
        "  cq = QuantizeLinear (c, s)"
        " y = DequantizeLinear (cq, s) }"
    ).graph
    for node in graph.node:
        node.name = node.output[0]
    labels = {
        k.node: speed.label(k).removeprefix("QuantizeLinear/DequantizeLinear ")
        for k in kernels(graph, graph)
        if k.operator in CONVERSIONS
    }
    assert labels == {
        "xq": "at an input", "xd": "around Resize", "rq": "around Resize", "rd": "around Erf and Softmax",
        "cq": "around Add", "y": "at an output"
    }  # fmt: skip
    borders = {k.node: k.border for k in kernels(graph, graph) if k.operator in CONVERSIONS}
    assert borders == {"xq": "x", "xd": "x", "rq": "r", "rd": "r", "cq": "c", "y": "c"}


def test_types_are_those_that_the_operators_compute_in():
    graph = parse(
        "g (float[1,4] x, bool[1,4] b, float s, uint8 z, int8[4,4] w) => (float[1,4] y) {"
        " xq = QuantizeLinear (x, s, z)  m = MatMulInteger (xq, w)  f = Cast <to: int = 1> (m)"
        "  i = Shape (x)  h = Cast <to: int = 10> (f)  a = Abs (h)  c = Where (b, f, x)  y = Relu (c) }"
    ).graph
    found = {k.kernel: k.precision for k in kernels(graph, graph) if k.kernel != "Cast"}
    assert found == {
        "QuantizeLinear": "float32", "MatMulInteger": "uint8", "Shape": "float32", "Abs": "float16",
        "Where": "float32", "Relu": "float32"
    }  # fmt: skip


def test_a_fused_node_stands_for_all_that_it_computes():
    """Whatever this onnxruntime fuses, no operator with a time of its own is lost or counted twice."""
    model = small_convnet()
    found = runtimes.make().kernels(model)
    named = [name for k in found for name in k.stands_for]
    assert len(named) == len(set(named))
    timed = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm", "Relu", "Add")]
    assert {n.output[0] for n in timed} <= set(named)
    assert all(k.stands_for or k.operator in CONVERSIONS for k in found)


def test_integer_kernels_stand_for_the_operators_that_were_planned(quantized):
    found = {k.operator: k for k in runtimes.make().kernels(quantized)}
    assert found["Conv"].quantized
    assert found["Conv"].precision == "uint8"
    original = {n.name: n.op_type for n in quantized.graph.node}
    for kernel in runtimes.make().kernels(quantized):
        if kernel.quantized and kernel.operator in ("Conv", "Gemm"):
            assert kernel.operator in {original[name] for name in kernel.stands_for}


def test_names_are_found_with_what_onnxruntime_adds_to_them():
    graph = parse(
        "g (float[1,2,4,4] x, float[2,2,1,1] w) => (float[1,2,4,4] z) { y = Conv (x, w)  z = Relu (y) }"
    ).graph
    graph.node[0].name = "/c/Conv"
    for name in ("/c/Conv", "/c/Conv_token_12", "y_nchwc", "y_bn_nchwc"):
        assert Origins(graph).named(name) == (("/c/Conv",), "")
    assert Origins(graph).named("reorder_token_3") == ((), "")


def test_nodes_without_names_are_told_apart():
    """Two nodes without a name are called by their outputs; a profile names no node twice."""
    model = parse(
        "g (float[2,8] x, float[8,8] w) => (float[2,8] z) { y = MatMul (x, w)  e = Erf (y)  z = MatMul (e, w) }",
        {"w": normal(8, 8)},
    )
    for node in model.graph.node:
        node.name = ""
    times = runtimes.make().profile(model, {"x": normal(2, 8)})
    assert {name for t in times for name in t.kernel.stands_for} == {"y", "e", "z"}
    assert all(t.seconds > 0 for t in times)
