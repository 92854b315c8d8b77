"""Layers that stay float, whose weights are stored as integers of their bits."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from drawing import INPUTS, deck, drawn
from graphs import images, normal, parse, silent
from onnx import TensorProto, numpy_helper

import eptq_onnx
from eptq_onnx import Config, ConfigError, runtimes, targets
from eptq_onnx.graph import edit
from eptq_onnx.graph.packing import weights_of
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.runtime import Session

WEIGHTS = {
    "w0": normal(64, 32, 1, 1),
    "w1": normal(64, 16, 3, 3, seed=1),
    "b1": normal(64, seed=5),
    "w2": normal(96, 64, 1, 1, seed=2),
    "w3": normal(32, 96, 3, 3, seed=3),
    "w4": normal(32, 40, seed=4),
}


def network():
    return parse(
        """
        g (float[N,32,6,6] x) => (float[N,40] y) {
            a = Conv (x, w0)  b = Relu (a)  c = Conv <group = 4, pads = [1,1,1,1]> (b, w1, b1)  d = Relu (c)
            e = Conv (d, w2)  f = Relu (e)  h = Conv (f, w3)  i = GlobalAveragePool (h)  j = Flatten (i)
            y = MatMul (j, w4)
        }
        """,
        WEIGHTS,
    )


def quantized(bits, **options):
    chosen = {"preset": "fast", "measure_speed": False, "objective": "integers", **options}
    return eptq_onnx.quantize(network(), images(16, 32, 6), Config(bits=bits, **chosen), progress=silent)


def kernels(model):
    return {k.kernel for k in runtimes.make().kernels(model)}


def floats_of(model):
    """Values of the weights that the file's nodes make, by their names in the float model."""
    names = [n for n in WEIGHTS if n in GraphView(model).producer]
    return Session(edit.exposing(model, names)).run({"x": images(1, 32, 6)}, names)


@pytest.mark.parametrize(("bits", "edge"), [(8, 8), (4, 4), (3, 8), (2, 2)])
def test_weights_alone_take_their_bits_and_float_kernels_run(bits, edge):
    result = quantized(f"w{bits}a32", edge_bits=edge)
    assert [(x.weight_bits, x.activation_bits) for x in result.report.layers] == [
        (edge, 32), (bits, 32), (bits, 32), (bits, 32), (edge, 32)
    ]  # fmt: skip
    size = sum(
        v.size * (edge if name in ("w0", "w4") else bits) / 8 for name, v in WEIGHTS.items() if name != "b1"
    )
    assert size <= result.report.sizes["weights"] < 1.1 * size + 600
    assert result.model.ByteSize() < size + 9000
    assert result.report.sizes["float constants"] < 100
    found = kernels(result.model)
    assert not {k for k in found if "Q" in k or "Integer" in k or "Quantize" in k or k in ("Cast", "Mul")}
    assert "NBits" not in " ".join(found)
    assert result.report.verification.planned == {}


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_values_are_those_of_the_plan(bits):
    """What the file's nodes make is integers times scales, and within rounding of the float weights."""
    result = quantized(f"w{bits}a32", edge_bits=bits, start="nearest", steps=0, rotate=False, equalize=False)
    view = GraphView(result.model)
    made = floats_of(result.model)
    assert len(made) == 5
    for name, values in made.items():
        [scales] = [view.constant(i) for i in view.producer[name].input if view.is_constant(i)]
        steps = values / scales
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
        others = tuple(k for k, size in enumerate(scales.shape) if size == 1)
        low, high = (np.rint(f(steps, axis=others, keepdims=True)) for f in (np.min, np.max))
        assert (high - low < 2**bits).all()
        inside = (steps > low + 0.5) & (steps < high - 0.5)
        errors = np.abs(values - WEIGHTS[name]) / scales
        assert inside.mean() > 0.3
        assert (errors[inside] < 0.501).all()
    exact = network()
    for tensor in exact.graph.initializer:
        if tensor.name in made:
            tensor.CopyFrom(numpy_helper.from_array(made[tensor.name], tensor.name))
        elif tensor.name == "b1":
            [name] = [
                n.input[2] for n in result.model.graph.node if n.op_type == "Conv" and len(n.input) > 2
            ][-1:]
            tensor.CopyFrom(numpy_helper.from_array(view.constant(name), "b1"))
    feeds = {"x": images(4, 32, 6, seed=9)}
    np.testing.assert_allclose(
        Session(result.model).run(feeds)["y"], Session(exact).run(feeds)["y"], rtol=1e-3, atol=1e-3
    )


def test_a_float_layer_between_quantizers_stays_float():
    """Newer versions of onnxruntime would quantize its weight once more, with one scale."""
    result = quantized(["w4a8", "Conv_2=w4a32", "Conv_6=w4a32"])
    verification = result.report.verification
    assert verification.planned["Conv"] == verification.kernels["Conv"] == 2
    names = [k.kernel for k in runtimes.make().kernels(result.model)]
    assert sum(k in ("Conv", "FusedConv") for k in names) == 2
    [relu] = [n for n in result.model.graph.node if n.op_type == "LeakyRelu"][:1]
    assert relu.attribute[0].f == 1.0
    layers = {x.node: (x.weight_bits, x.activation_bits) for x in result.report.layers}
    assert layers["Conv_2"] == layers["Conv_6"] == (4, 32)
    assert layers["Conv_4"] == (4, 8)


def test_only_runtimes_that_quantize_unasked_need_a_guard():
    options = Config(bits=["Conv_2=w8a32"])
    model = normalize(network(), 17)
    assert plan(model, targets.load("ort-x64"), options).guarded == {"c"}
    assert plan(model, targets.load("openvino"), options).guarded == frozenset()


def test_what_the_user_excludes_keeps_its_weights():
    result = quantized("w4a8", exclude="Conv_2", rotate=False, equalize=False)
    assert "Conv_2" not in {x.node for x in result.report.layers}
    np.testing.assert_array_equal(GraphView(result.model).constant("w1"), WEIGHTS["w1"])


def test_tensors_around_which_weights_stay_float():
    model, target = normalize(network(), 17), targets.load("ort-x64")
    options = Config()
    [layer] = [x for x in plan(model, target, options).layers if x.node == "Conv_4"]
    stored = plan(model, target, options, {layer.input: "noise"})
    assert "Conv_4" in {x.node for x in stored.stored}
    exact = plan(model, target, options, {layer.input: "noise"}, exact=[layer.input])
    assert "Conv_4" not in {x.node for x in exact.layers}


def test_small_weights_stay_float():
    model = parse(
        "g (float[N,4,4,4] x) => (float[N,4,4,4] y) { a = Conv (x, w) y = Conv (a, v) }",
        {"w": normal(4, 4, 1, 1), "v": normal(4, 4, 5, 5)},
    )
    made = plan(normalize(model, 17), targets.load("ort-x64"), Config(bits="w8a32"))
    assert [x.weight for x in made.stored] == ["v"]


def test_a_weight_of_a_float_and_of_an_integer_layer_is_stored_once():
    model = parse(
        """
        g (float[N,96,6,6] x) => (float[N,96,6,6] y) {
            a = Conv (x, w)  b = Relu (a)  c = Conv (b, w)  d = Relu (c)  y = Conv (d, v)
        }
        """,
        {"w": normal(96, 96, 1, 1), "v": normal(96, 96, 1, 1, seed=1)},
    )
    config = Config(
        preset="fast", measure_speed=False, objective="integers", bits=["w4a8", "Conv_2=w4a32"], edge_bits=4
    )
    result = eptq_onnx.quantize(model, images(16, 96, 6), config, progress=silent)
    assert result.model.ByteSize() < 2 * 96 * 96 / 2 + 9000
    assert result.report.verification.kernels["Conv"] == 2


def test_targets_that_do_not_unpack_weights_refuse_them():
    with pytest.raises(ConfigError, match=r"target qnn does not store the weights of float layers"):
        quantized("w8a32", target="qnn")


@pytest.mark.parametrize("storage", ["int8", "packed"])
def test_the_file_is_read_again_with_its_bits(storage):
    result = quantized("w4a32", storage=storage, edge_bits=4)
    found = weights_of(GraphView(result.model)) if storage == "int8" else {}
    assert len(found) == (5 if storage == "int8" else 0)
    assert all(axis is not None for axis in found.values())
    assert not [f for f in eptq_onnx.lint(result.model, "ort-x64").findings if f.severity.value == "error"]
    onnx.checker.check_model(result.model, full_check=True)


@pytest.mark.parametrize("bits", ["w8a32", "w4a32"])
@pytest.mark.parametrize("seed", [0, 1])
def test_drawn_networks_with_quantized_weights_alone(monkeypatch, seed, bits):
    """Whatever a float layer is: its weight is stored, it runs in float, and 8 bits are close."""
    monkeypatch.setattr("eptq_onnx.method.plan.storing._NODES", -(10**6))
    rng = np.random.default_rng(seed)
    data = {name: rng.normal(size=(24, width)).astype(np.float32) for name, width in INPUTS.items()}
    options = Config(bits=bits, edge_bits=int(bits[1]), preset="fast", measure_speed=False)
    for opset, samples in deck(seed, 12)[:2]:
        model = drawn(seed, opset, samples)
        result = eptq_onnx.quantize(model, data, options, progress=silent)
        assert {(x.weight_bits, x.activation_bits) for x in result.report.layers} == {(int(bits[1]), 32)}
        assert not {k for k in kernels(result.model) if k.startswith(("QLinear", "QGemm", "MatMulInteger"))}
        assert bits != "w8a32" or all(x.sqnr_db > 15 for x in result.report.layers)


def test_scales_stay_float32_where_the_rest_is_float16():
    """Runtimes fold them when they load the file, and onnxruntime cannot fold a product in float16."""
    result = quantized("w4a32", target="ort-web", rest="float16")
    view = GraphView(result.model)
    products = [n for n in view.nodes if n.op_type == "Mul"]
    assert len(products) == 5
    for node in products:
        [scales] = [i for i in node.input if view.is_constant(i)]
        assert view.initializers[scales].data_type == TensorProto.FLOAT
        [cast] = view.consumers[node.output[0]]
        assert (cast.op_type, cast.attribute[0].i) == ("Cast", TensorProto.FLOAT16)
    assert "Mul" not in kernels(result.model)
