from __future__ import annotations

import numpy as np
from graphs import images, normal, parse, silent, small_convnet

from eptq_onnx import data, targets
from eptq_onnx.config import Config, WeightRange
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.calibrate import calibrate
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.method.ranges import weight_ranges
from eptq_onnx.numerics.formats import along_axis
from eptq_onnx.records import Scores

TARGET = targets.load("ort-x64")


def start(model, feeds, config, scores=None):
    model = normalize(model, 13)
    p = plan(model, TARGET, config)
    calibration = calibrate(model, p, data.read(feeds, model), config, silent)
    return model, p, calibration, weight_ranges(model, p, calibration, scores, config)


def test_nearest_rounding_with_positive_scales():
    config = Config(weight_bits=4, weight_range=WeightRange.MSE)
    model, p, _, rounding = start(small_convnet(), {"image": images()}, config)
    view = GraphView(model)
    for name, spec in p.weight_specs.items():
        assert (rounding.weights[name].scale > 0).all()
        assert rounding.integers[name].min() >= spec.qmin
        assert rounding.integers[name].max() <= spec.qmax
        nearest = rounding.weights[name].in_container(view.constant(name))
        np.testing.assert_array_equal(rounding.integers[name], nearest)


def test_minmax_clips_nothing():
    config = Config(weight_range=WeightRange.MINMAX)
    model, p, _, rounding = start(small_convnet(), {"image": images()}, config)
    for name, spec in p.weight_specs.items():
        back = rounding.weights[name].dequantize(rounding.integers[name])
        half = along_axis(rounding.weights[name].scale, spec.axis, back.ndim) / 2
        assert (np.abs(back - GraphView(model).constant(name)) <= half * 1.001).all()


def test_importance_is_used_by_hmse_only():
    base = Config(weight_bits=3, weight_range=WeightRange.HMSE)
    model, p, calibration, plain = start(small_convnet(), {"image": images()}, base)
    h = {n: np.abs(normal(*GraphView(model).constant(n).shape, seed=9)) ** 4 for n in p.weight_specs}
    scores = Scores({}, h, {}, 5)
    weighted = weight_ranges(model, p, calibration, scores, base)
    ignored = weight_ranges(
        model, p, calibration, scores, Config(weight_bits=3, weight_range=WeightRange.MSE)
    )
    assert any((weighted.weights[n].scale != plain.weights[n].scale).any() for n in h)
    assert all((ignored.weights[n].scale == plain.weights[n].scale).all() for n in h)


def test_a_large_bias_on_tiny_weights_does_not_overflow_int32():
    model = parse(
        "g (float[N,3,8,8] x) => (float[N,4,6,6] y) { y = Conv (x, w, b) }",
        {
            "w": normal(4, 3, 3, 3) * np.array([1, 1e-9, 0, 1], np.float32).reshape(-1, 1, 1, 1),
            "b": np.array([1, 1000, 50, 0], np.float32),
        },
    )
    _, _p, calibration, rounding = start(model, {"x": images() * 1e-3}, Config(weight_range=WeightRange.MSE))
    scale = calibration.grids["x"].scale * rounding.weights["w"].scale
    assert (np.abs([1, 1000, 50, 0]) / scale < 2**31).all()


def test_layers_without_a_bias_get_a_zero_one():
    model = parse("g (float[N,3,8,8] x) => (float[N,4,6,6] y) { y = Conv (x, w) }", {"w": normal(4, 3, 3, 3)})
    _, p, _, rounding = start(model, {"x": images()}, Config(weight_range=WeightRange.MSE))
    (layer,) = p.layers
    assert not layer.has_bias
    assert rounding.biases[layer.bias].tolist() == [0] * 4
