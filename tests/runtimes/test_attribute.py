"""Regions and borders, from made-up profiles and from one of this machine's onnxruntime."""

from __future__ import annotations

import pytest
from graphs import images, silent, small_convnet

import eptq_onnx
from eptq_onnx import Config, runtimes
from eptq_onnx.runtimes.attribute import attribute, joined, same_nodes
from eptq_onnx.runtimes.base import Kernel, NodeTime


def spent(seconds, kernel, operator, *nodes, precision="float32", border=""):
    return NodeTime(Kernel(f"{kernel}{nodes}{border}", kernel, operator, precision, nodes, border), seconds)


SILU = [
    spent(5.0, "Conv", "Conv", "conv"),
    spent(1.0, "QuickGelu", "QuickGelu", "sigmoid", "mul"),
    spent(0.5, "ReorderOutput", "layout", border="y"),
]
QUANTIZED_SILU = [
    spent(3.0, "QLinearConv", "Conv", "conv", precision="uint8"),
    spent(2.0, "QLinearSigmoid", "Sigmoid", "sigmoid", precision="uint8"),
    spent(1.5, "QLinearMul", "Mul", "mul", precision="uint8"),
    spent(0.25, "QuantizeLinear", "QuantizeLinear", border="x"),
    spent(0.5, "DequantizeLinear", "DequantizeLinear", border="y"),
    spent(0.125, "DequantizeLinear", "DequantizeLinear", border="y"),
    spent(4.0, "Mystery", "Mystery"),
]


def test_what_one_of_the_models_fuses_is_compared_as_a_whole():
    found = joined(SILU, QUANTIZED_SILU)
    rows = {r.nodes: (r.float_seconds, r.quantized_seconds, r.kernels) for r in found.regions}
    assert rows == {
        ("sigmoid", "mul"): (1.0, 3.5, ("QLinearSigmoid uint8", "QLinearMul uint8")),
        ("conv",): (5.0, 3.0, ("QLinearConv uint8",)),
    }
    assert [r.nodes for r in found.regions] == [("sigmoid", "mul"), ("conv",)], "largest increase first"
    region = found.region_of("mul")
    assert region is not None
    assert region.nodes == ("sigmoid", "mul")
    assert found.region_of("constant") is None


def test_conversions_belong_to_the_tensor_that_they_convert():
    found = {b.tensor: (b.float_seconds, b.quantized_seconds) for b in joined(SILU, QUANTIZED_SILU).borders}
    assert found == {
        "x": ({}, {"QuantizeLinear": 0.25}),
        "y": ({"layout": 0.5}, {"DequantizeLinear": 0.625}),
    }


def test_no_second_is_lost():
    found = joined(SILU, QUANTIZED_SILU)
    assert found.quantized_rest == {"Mystery": 4.0}
    for k, times in enumerate((SILU, QUANTIZED_SILU)):
        sides = [(r.float_seconds, r.quantized_seconds)[k] for r in found.regions]
        borders = [sum((b.float_seconds, b.quantized_seconds)[k].values()) for b in found.borders]
        rest = sum((found.float_rest, found.quantized_rest)[k].values())
        assert sum(sides) + sum(borders) + rest == pytest.approx(sum(t.seconds for t in times))


def test_a_shape_that_two_kernels_share_does_not_join_them():
    exact = [spent(1.0, "A", "Reshape", "shape", "a"), spent(2.0, "B", "Reshape", "shape", "b")]
    assert {r.nodes for r in joined(exact, []).regions} == {("a",), ("b",)}


def test_chains_of_fusions_become_one_region():
    exact = [spent(1.0, "F", "Conv", "a", "b"), spent(1.0, "G", "Conv", "c", "d")]
    quantized = [spent(1.0, "H", "Conv", "b", "c"), spent(1.0, "I", "Conv", "e")]
    regions = {frozenset(r.nodes): r.float_seconds for r in joined(exact, quantized).regions}
    assert regions == {frozenset("abcd"): 2.0, frozenset("e"): 0.0}


def test_nodes_of_other_names_are_given():
    found = joined(
        [spent(2.0, "Conv", "Conv", "conv")],
        [spent(1.0, "QLinearConv", "Conv", "Conv_0")],
        {"Conv_0": "conv"},
    )
    assert [(r.nodes, r.float_seconds, r.quantized_seconds) for r in found.regions] == [(("conv",), 2.0, 1.0)]


def test_both_forms_of_a_real_model_are_compared_node_by_node():
    model = small_convnet()
    config = Config(preset="fast", measure_speed=False)
    quantized = eptq_onnx.quantize(model, images(8), config, progress=silent).model
    assert same_nodes(model.graph, quantized.graph)["Conv_5"] == "c3"
    found = attribute(runtimes.make(), (model, quantized), {"image": images(1)})
    for conv in ("c1", "c2", "c3", "logits"):
        region = found.region_of(conv)
        assert region is not None
        assert region.float_seconds > 0
        assert region.quantized_seconds > 0
        assert any(kernel.endswith("uint8") for kernel in region.kernels)
    assert sum(found.float_rest.values()) == sum(found.quantized_rest.values()) == 0
    borders = {b.tensor for b in found.borders}
    assert "image" in borders
    # Newer versions dequantize in front of the Flatten.
    assert borders & {"f", "p"}
