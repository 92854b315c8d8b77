from __future__ import annotations

from collections import Counter
from importlib import resources

import numpy as np
import onnx
import pytest
from graphs import images, normal, parse, silent, small_convnet

from eptq_onnx import data, targets
from eptq_onnx.config import Config
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.calibrate import calibrate
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.method.qdq import write
from eptq_onnx.method.ranges import weight_ranges
from eptq_onnx.numerics import quant_math
from eptq_onnx.runtime import Session

TARGET = targets.load("ort-x64")


def written(model, feeds, target=TARGET, **options):
    config = Config(preset="fast", **options)
    model = normalize(model, target.min_opset)
    p = plan(model, target, config)
    calibration = calibrate(model, p, data.read(feeds, model), config, silent)
    rounding = weight_ranges(model, p, calibration, None, config)
    quantized, stands_for = write(model, p, rounding)
    onnx.checker.check_model(quantized, full_check=True)
    return model, p, rounding, quantized, stands_for


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in model.graph.node)


def test_interface_and_structure():
    model, p, _, quantized, stands_for = written(small_convnet(), {"image": images()})
    assert [i.name for i in quantized.graph.input] == ["image"]
    assert [o.name for o in quantized.graph.output] == ["logits"]
    assert quantized.graph.output[0] == model.graph.output[0]
    counts = ops(quantized)
    assert counts["QuantizeLinear"] == sum(len(q.tensors) for q in p.activations)
    assert counts["DequantizeLinear"] == counts["QuantizeLinear"] + 2 * len(p.layers)
    assert "Relu" not in counts
    assert "Clip" not in counts
    assert set(stands_for) == set(p.quantizer_of)


def test_what_is_stored_dequantizes_to_what_was_decided_bit_for_bit():
    _, p, rounding, quantized, _ = written(small_convnet(), {"image": images()}, weight_bits=4)
    names = [n.output[0] for n in quantized.graph.node if n.op_type == "DequantizeLinear"]
    probe = onnx.ModelProto()
    probe.CopyFrom(quantized)
    for name in names:
        if name in p.weight_specs:
            probe.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    values = Session(probe, optimize=False).run({"image": images(1)})
    view = GraphView(quantized)
    for name in p.weight_specs:
        real = rounding.weights[name].dequantize(rounding.integers[name])
        np.testing.assert_array_equal(values[name], real)
        stored = view.constant(f"{name}_quantized")
        assert stored.dtype == np.int8
        np.testing.assert_array_equal(
            stored, quant_math.folded(rounding.integers[name], rounding.weights[name])[0]
        )
        assert not view.constant(view.producer[name].input[2]).any()
    assert any(np.any(rounding.weights[name].zero_point) for name in p.weight_specs)


def test_bias_is_int32_with_the_product_of_the_scales():
    _, p, rounding, quantized, _ = written(small_convnet(), {"image": images()})
    view = GraphView(quantized)
    for layer in p.layers:
        scale = view.constant(view.producer[layer.bias].input[1])
        activation = rounding.grids[p.quantizer_of[layer.input].name].scale
        np.testing.assert_array_equal(scale, activation * rounding.weights[layer.weight].scale)
        stored = view.constant(f"{layer.bias}_quantized")
        assert stored.dtype == np.int32
        np.testing.assert_allclose(
            stored * scale, rounding.biases[layer.bias], atol=float(scale.max()) * 0.51
        )


def test_four_bit_activations_stay_in_their_range_and_kernels_stay_integer(tmp_path):
    _, _p, _, quantized, stands_for = written(small_convnet(), {"image": images()}, activation_bits=4)
    probe = onnx.ModelProto()
    probe.CopyFrom(quantized)
    view = GraphView(quantized)
    clipped = [view.producer[name].input[0] for name in (stands_for["a1"], stands_for["a2"], stands_for["s"])]
    for name in clipped:
        probe.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    values = Session(probe).run({"image": images(4) * 3})
    for name in clipped:
        assert values[name].max() <= 15
    Session(quantized, save_optimized=tmp_path / "o.onnx")
    kernels = ops(onnx.load(tmp_path / "o.onnx"))
    assert kernels["QLinearConv"] == 3
    assert kernels["QGemm"] == 1
    assert kernels["QLinearAdd"] == 1
    assert "Conv" not in kernels


def test_a_quantized_graph_output_keeps_its_name():
    model, p, _, quantized, _ = written(
        parse(
            "g (float[N,3,8,8] x) => (float[N,4,6,6] y) { c = Conv (x, w)  y = Relu (c) }",
            {"w": normal(4, 3, 3, 3)},
        ),
        {"x": images()},
    )
    assert "y" in p.quantizer_of
    assert GraphView(quantized).producer["y"].op_type == "DequantizeLinear"
    expected, got = Session(model).run({"x": images(2)})["y"], Session(quantized).run({"x": images(2)})["y"]
    assert quant_math.sqnr_db(float(np.square(expected).sum()), float(np.square(expected - got).sum())) > 30


def test_an_output_that_is_also_read_inside():
    _model, _, _, quantized, _ = written(
        parse(
            "g (float[N,3,8,8] x) => (float[N,4,6,6] y, float[N,4,6,6] z) {"
            " y = Conv (x, w)  z = Conv (y, v) }",
            {"w": normal(4, 3, 3, 3), "v": normal(4, 4, 1, 1)},
        ),
        {"x": images()},
    )
    values = Session(quantized).run({"x": images(2)})
    assert set(values) == {"y", "z"}


def test_a_weight_read_in_float_elsewhere_is_kept_in_float_for_that_reader():
    model, _p, _, quantized, _ = written(
        parse(
            "g (float[N,3,8,8] x, float[4,3,3,3] k) => (float[N,4,6,6] y, float[4,3,3,3] t) {"
            " y = Conv (x, w)  t = Add (w, k) }",
            {"w": normal(4, 3, 3, 3)},
        ),
        {"x": images(4), "k": np.zeros((4, 3, 3, 3), np.float32)},
    )
    w = GraphView(model).constant("w")
    got = Session(quantized).run({"x": images(1), "k": np.zeros((4, 3, 3, 3), np.float32)})["t"]
    np.testing.assert_array_equal(got, w)


def test_shared_weights_are_stored_once():
    _, _, _, quantized, _ = written(
        parse(
            "g (float[N,3,8,8] x) => (float[N,3,h,w] y) { a = Conv (x, w)  b = Relu (a)  y = Conv (b, w) }",
            {"w": normal(3, 3, 3, 3)},
        ),
        {"x": images()},
    )
    assert (
        sum(t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4 for t in quantized.graph.initializer)
        == 1
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_target_is_data(tmp_path, symmetric):
    """Another target file selects other types and a float bias."""
    text = (resources.files("eptq_onnx.targets") / "ort-x64.toml").read_text()
    text = text.replace("integer = true", "integer = false").replace(
        'container = "uint8"', 'container = "int8"'
    )
    text = text.replace("symmetric = false", f"symmetric = {str(symmetric).lower()}")
    (tmp_path / "mine.toml").write_text(text)
    target = targets.load(str(tmp_path / "mine.toml"))
    model, _p, _, quantized, _ = written(small_convnet(), {"image": images()}, target)
    assert all(t.data_type != onnx.TensorProto.INT32 for t in quantized.graph.initializer)
    zero_points = [
        t
        for t in quantized.graph.initializer
        if t.name.endswith("zero_point") and t.data_type == onnx.TensorProto.INT8
    ]
    assert zero_points
    if symmetric:
        assert all(not onnx.numpy_helper.to_array(t).any() for t in zero_points)
    expected, got = (
        Session(model).run({"image": images(4)})["logits"],
        Session(quantized).run({"image": images(4)})["logits"],
    )
    assert quant_math.sqnr_db(float(np.square(expected).sum()), float(np.square(expected - got).sum())) > 20


@pytest.mark.parametrize("size", [8, 9])
def test_a_subgraph_reads_what_the_quantizer_makes_of_an_absorbed_activation(size):
    text = """
        g (float[N,3,H,W] x) => (float[N,4,H,W] y, float[N,4,H,W] d) {
            c = Conv (x, w)  h = Relu (c)  d = Conv (h, v)
            shape = Shape (d)  height = Gather (shape, two)  flag = Equal (height, size)
            y = If (flag) <
                then_branch = a () => (float[N,4,H,W] t) { t = Neg (h) },
                else_branch = b () => (float[N,4,H,W] u) { u = Identity (h) }
            >
        }
    """
    constants = {
        "w": normal(4, 3, 1, 1),
        "v": normal(4, 4, 1, 1),
        "two": np.array([2]),
        "size": np.array([size]),
    }
    model = parse(text, constants)
    quantized = written(model, images(8))[3]
    x = {"x": images(8)}
    expected, got = Session(model).run(x)["y"], Session(quantized).run(x)["y"]
    assert np.abs(expected - got).mean() < 0.01 * np.abs(expected).max()


@pytest.mark.parametrize(("function", "clips"), [("Relu", True), ("Tanh", False)])
def test_what_chooses_reads_exact_values_unless_a_quantizer_clips_them(function, clips):
    text = f"""g (float[N,4,6] x) => (float[N,4,5] y) {{
        h = MatMul (x, w)  r = {function} (h)  m = ReduceMax <axes = [1]> (r)
        i = ArgMax <axis = 2, keepdims = 0> (m)  q = Gather (table, i)
        d = MatMul (r, v)  y = Add (d, q) }}"""
    constants = {"w": normal(6, 8), "v": normal(8, 5, seed=1), "table": normal(8, 5, seed=2)}
    _, p, _, quantized, stands_for = written(parse(text, constants), {"x": normal(64, 4, 6, seed=3)})
    largest = next(n for n in quantized.graph.node if n.op_type == "ReduceMax")
    assert largest.name in p.exact
    assert largest.input[0] == (stands_for["r"] if clips else "r")


@pytest.mark.parametrize(
    "limits", ["lo, hi", "lo", ", hi", ""], ids=["both", "the lower", "the upper", "none"]
)
@pytest.mark.parametrize("target", ["ort-x64", "qnn", "openvino"])
@pytest.mark.parametrize("others", ["", "z = HardSigmoid (x)"])
def test_a_clip_of_an_input_in_front_of_a_quantizer_loads(limits, target, others):
    """onnxruntime 1.19 fails to drop it."""
    ends = {"lo": np.float32(0), "hi": np.float32(6)}
    model = normalize(
        parse(
            f"g (float[2,4,6,6] x) => (float[2,4,6,6] y{', float[2,4,6,6] z' if others else ''}) "
            f"{{ {others} c = Clip (x{', ' + limits if limits else ''}) y = Conv (c, w) }}",
            {"w": normal(4, 4, 1, 1), **{k: np.asarray(v) for k, v in ends.items() if k in limits}},
        ),
        13,
    )
    feeds = {"x": normal(2, 4, 6, 6, seed=1, scale=3)}
    _, _, _, quantized, _ = written(model, feeds, targets.load(target))
    optimized, plain = (Session(quantized, optimize=on).run(feeds)["y"] for on in (True, False))
    exact = Session(model).run(feeds)["y"]
    scale = float(np.abs(exact).max())
    np.testing.assert_allclose(optimized, plain, atol=scale / 100)
    np.testing.assert_allclose(plain, exact, atol=scale / 20)
