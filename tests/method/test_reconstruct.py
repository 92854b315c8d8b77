"""Layer-wise reconstruction comes closer to the float model than nearest rounding, on unseen samples."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from graphs import images, normal, parse, silent, small_convnet

from eptq_onnx import data, targets
from eptq_onnx.config import Config
from eptq_onnx.data.samples import Selection
from eptq_onnx.method.calibrate import calibrate
from eptq_onnx.method.estimate import multiplications
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.method.qdq import write
from eptq_onnx.method.ranges import weight_ranges
from eptq_onnx.method.reconstruct import enough_samples, reconstruct
from eptq_onnx.numerics.biases import BiasSpec
from eptq_onnx.numerics.moments import sampled_moments
from eptq_onnx.records import Network, Scores
from eptq_onnx.runtime import Session
from eptq_onnx.targets import Operator

TARGET = targets.load("ort-x64")


def run(model, scores=None, make=images, **options):
    config = Config(**{"weight_bits": 3, "edge_bits": 3, "preset": "fast", **options})
    model = normalize(model, 13)
    p = plan(model, TARGET, config)
    samples = data.read({model.graph.input[0].name: make(64)}, model)
    calibration = calibrate(model, p, samples, config, silent)
    nearest = weight_ranges(model, p, calibration, None, config)
    quantized, _ = write(model, p, nearest)
    rounding, skipped = reconstruct(
        Network(model, p, calibration, scores),
        quantized,
        nearest,
        Selection(samples, np.arange(64)),
        config,
        silent,
    )
    return model, p, nearest, rounding, skipped


def smooth(count: int, seed: int = 0) -> np.ndarray:
    """Return images with similar neighbouring pixels, so that errors can compensate each other."""
    return images(count, size=2, seed=seed).repeat(4, axis=2).repeat(4, axis=3)


def error(model, p, rounding, make=images) -> float:
    x = {model.graph.input[0].name: make(64, seed=5)}
    exact, rough = Session(model).run(x), Session(write(model, p, rounding)[0]).run(x)
    return sum(float(np.square(exact[n] - rough[n]).sum()) for n in exact)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_start_beats_nearest_rounding_on_unseen_samples(bits):
    model, p, nearest, rounding, skipped = run(small_convnet(), weight_bits=bits, edge_bits=bits)
    assert not skipped
    assert error(model, p, rounding) < (0.6 if bits < 8 else 1.0) * error(model, p, nearest)


def test_integers_stay_in_range_and_scales_positive():
    _, p, _, rounding, _ = run(small_convnet())
    for name, spec in p.weight_specs.items():
        assert rounding.integers[name].min() >= spec.qmin
        assert rounding.integers[name].max() <= spec.qmax
        assert (rounding.weights[name].scale > 0).all()


def test_grouped_transposed_convolutions_share_the_scales_of_their_channels():
    rows = {**TARGET.operators, "ConvTranspose": Operator(runs="layer", output="quantized")}
    target = TARGET.model_copy(
        update={"operators": rows, "bias": TARGET.bias.model_copy(update={"integer": False})}
    )
    model = normalize(
        parse(
            "g (float[N,3,8,8] x) => (float[N,6,17,17] y) { c = Conv <pads = [1,1,1,1]> (x, w1) \n"
            " y = ConvTranspose <strides = [2,2], group = 2> (c, w2) }",
            {"w1": normal(4, 3, 3, 3), "w2": normal(4, 3, 3, 3, seed=1)},
        ),
        13,
    )
    config = Config(weight_bits=3, edge_bits=3, preset="fast")
    p = plan(model, target, config)
    samples = data.read({"x": smooth(32)}, model)
    calibration = calibrate(model, p, samples, config, silent)
    nearest = weight_ranges(model, p, calibration, None, config)
    rounding, skipped = reconstruct(
        Network(model, p, calibration),
        write(model, p, nearest)[0],
        nearest,
        Selection(samples, np.arange(32)),
        config,
        silent,
    )
    assert not skipped
    assert rounding.weights["w2"].scale.shape == (3,)
    assert error(model, p, rounding, smooth) < 0.9 * error(model, p, nearest, smooth)


def test_outputs_of_a_group_make_up_for_each_others_errors_where_they_are_added():
    weight = normal(16, 2, 3, 3)
    model = parse(
        "g (float[N,4,8,8] x) => (float[N,1,8,8] y) {"
        " c = Conv <group = 2, pads = [1,1,1,1]> (x, w)  y = ReduceSum (c, channels) }",
        {"w": weight, "channels": np.array([1])},
    )
    added = Scores(channels={}, weights={}, outputs={"c": np.ones((16, 16))}, output_size=64)
    errors = {}
    for name, scores in (("apart", None), ("together", added)):
        _, _, _, rounding, _ = run(model, scores, partial(images, channels=4))
        off = rounding.weights["w"].dequantize(rounding.integers["w"]) - weight
        errors[name] = np.square(off.reshape(2, 8, -1).sum(axis=1)).sum()
    assert errors["together"] < 0.3 * errors["apart"]


def halves(count: int, seed: int = 0) -> np.ndarray:
    """Images are smooth on the left and rough on the right, and need different roundings."""
    return np.concatenate(
        [smooth(count, seed)[..., :4], images(count, size=8, seed=seed + 1)[..., 4:]], axis=3
    )


def test_errors_are_least_where_the_outputs_look():
    model = parse("g (float[N,3,8,8] x) => (float[N,8,6,6] y) { y = Conv (x, w) }", {"w": normal(8, 3, 3, 3)})
    errors = {}
    for name, columns in {"all": slice(None), "left": slice(0, 2)}.items():
        seen = np.zeros((64, 6, 6), np.float32)
        seen[..., columns] = 1
        scores = Scores(
            {}, {}, {}, 288, positions={"y": seen.reshape(64, -1) / seen.mean()}, samples=np.arange(64)
        )
        float_model, p, _, rounding, _ = run(model, scores, halves)
        x = {"x": halves(64, seed=5)}
        exact, rough = (
            Session(float_model).run(x)["y"],
            Session(write(float_model, p, rounding)[0]).run(x)["y"],
        )
        errors[name] = np.square(exact - rough)[..., :2].sum()
    assert errors["left"] < 0.9 * errors["all"]


@pytest.mark.parametrize("function", ["Relu (c)", "Mul (c, s)", "PRelu (c, slopes)"])
def test_errors_are_least_where_the_function_behind_a_layer_is_steep(function, monkeypatch):
    model = parse(
        f"g (float[N,3,8,8] x) => (float[N,8,6,6] y) {{"
        f" c = Conv (x, w, b)  s = Sigmoid (c)  y = {function} }}",
        {
            "w": normal(8, 3, 3, 3),
            "b": np.linspace(-6, 0, 8, dtype=np.float32),
            "slopes": np.full((8, 1, 1), 0.05, np.float32),
        },
    )
    errors = {}
    for name, most in {"apart": 1e9, "together": 0.0}.items():
        monkeypatch.setattr("eptq_onnx.method.reconstruct.layers._MOST_APART", most)
        float_model, p, _, rounding, _ = run(model, make=smooth)
        errors[name] = error(float_model, p, rounding, smooth)
    assert errors["apart"] < 0.9 * errors["together"]


def test_a_shared_weight_keeps_its_rounding_and_says_so():
    body = "a = Conv <pads = [1,1,1,1]> (x, w)  b = Relu (a)  y = Conv <pads = [1,1,1,1]> (b, w)"
    model = parse(f"g (float[N,3,8,8] x) => (float[N,3,8,8] y) {{ {body} }}", {"w": normal(3, 3, 3, 3)})
    _, _, nearest, rounding, skipped = run(model)
    assert len(skipped) == 2
    assert all("shared" in why for why in skipped.values())
    np.testing.assert_array_equal(nearest.integers["w"], rounding.integers["w"])


def test_large_biases_keep_the_scales_that_int32_needs():
    model = parse(
        "g (float[N,3,8,8] x) => (float[N,4,6,6] y) { y = Conv (x, w, b) }",
        {
            "w": normal(4, 3, 3, 3) * np.array([1, 1e-9, 1, 1], np.float32).reshape(-1, 1, 1, 1),
            "b": np.array([1, 1000, 50, 0], np.float32),
        },
    )
    _, _, _, rounding, _ = run(model)
    scale = rounding.grids["x"].scale
    back = BiasSpec().round(rounding.biases["b"], scale, rounding.weights["w"].scale)
    np.testing.assert_allclose(back, [1, 1000, 50, 0], atol=0.5)


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_that_read_one_tensor_are_solved_as_one_problem_with_the_same_result(monkeypatch, bits):
    text = (
        "g (float[N,3,8,8] x) => (float[N,12,8,8] y) { h = Conv (x, w)"
        "  q = Conv (h, a)  k = Conv (h, b, c)  v = Conv (h, d)  s = Add (q, v)  t = Concat <axis = 1> (s, k)"
        "  y = Conv (t, e) }"
    )
    weights = {"w": normal(6, 3, 1, 1), "a": normal(5, 6, 1, 1, seed=1), "b": normal(4, 6, 1, 1, seed=2)}
    weights |= {"c": normal(4, seed=3), "d": normal(5, 6, 1, 1, seed=4), "e": normal(12, 9, 1, 1, seed=5)}
    sampled = []

    def counted(*arguments):
        sampled.append(arguments)
        return sampled_moments(*arguments)

    monkeypatch.setattr("eptq_onnx.method.reconstruct.layers.sampled_moments", counted)
    # All rows: layers by themselves would draw others.
    monkeypatch.setattr("eptq_onnx.method.reconstruct.layers.wanted_rows", lambda terms, bits: 10**6)
    options = {"weight_bits": bits, "edge_bits": bits, "correction_damping": 0.1}
    model, p, _, together, _ = run(parse(text, weights), **options)
    assert [len(p.layers), len(sampled)] == [5, 3]
    monkeypatch.setattr("eptq_onnx.method.reconstruct.read_together", lambda *arguments: {})
    _, _, _, apart, _ = run(parse(text, weights), **options)
    assert len(sampled) == 3 + 5
    for name, grid in apart.weights.items():
        # Sums in another order move values by a hair, and so a few integers by one.
        ours, theirs = (r.weights[name].dequantize(r.integers[name]) for r in (together, apart))
        np.testing.assert_allclose(ours, theirs, atol=1.1 * grid.scale.max())
        np.testing.assert_allclose(together.weights[name].scale, grid.scale, rtol=1e-3)
    assert error(model, p, together) == pytest.approx(error(model, p, apart), rel=0.1)


@pytest.mark.parametrize("bits", [4, 8])
def test_many_bits_take_as_many_samples_as_give_the_rows_that_layers_want(bits):
    model = normalize(small_convnet(), 13)
    config = Config(weight_bits=bits, edge_bits=8, preset="fast")
    layers = plan(model, TARGET, config)
    samples = data.read({"image": images(4)}, model)
    operations = multiplications(model, layers, samples)
    enough = enough_samples(model, layers, operations)
    if bits == 4:
        assert enough > 10**6, "all there are"
        return
    assert 32 <= enough <= 96
    fewer = {node: count / 10 for node, count in operations.items()}
    assert enough_samples(model, layers, fewer) >= enough, "layers with fewer positions need more samples"
    assert enough_samples(model, layers, dict.fromkeys(operations, 0.0)) == 96, "unknown: as many as ever"
    assert enough_samples(model, layers, dict.fromkeys(operations, 1e12)) == 32
