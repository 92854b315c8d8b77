from __future__ import annotations

import numpy as np
import pytest
from graphs import images, normal, parse, silent, small_convnet

from eptq_onnx import data, targets
from eptq_onnx.config import ActivationRange, Config
from eptq_onnx.method.calibrate import Histogram, calibrate, mse_range, percentile_range
from eptq_onnx.method.calibrate.seen import values_of_a_sample
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.formats import IntFormat
from eptq_onnx.numerics.spec import QuantSpec
from eptq_onnx.records import ActivationQuantizer
from eptq_onnx.runtime import Session

UINT8, UINT4 = (
    ActivationQuantizer(
        "t", ("t",), QuantSpec(IntFormat.full(bits, signed=False), zero_points=(0, 2**bits - 1))
    )
    for bits in (8, 4)
)


def filled(*parts: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part.astype(np.float32), per_sample=10**9)
    return histogram


def test_growing_loses_no_counts_and_keeps_the_extremes():
    rng = np.random.default_rng(0)
    parts = [rng.normal(0, scale, (4, 500)) for scale in (0.1, 1, 30, 0.5)]
    growing, at_once = filled(*parts), filled(np.concatenate(parts))
    assert growing.counts.sum() == 8000
    np.testing.assert_array_equal(growing.counts, at_once.counts)
    everything = np.concatenate(parts).astype(np.float32)
    assert (growing.low, growing.high) == (everything.min(), everything.max())


def test_memory_does_not_depend_on_the_number_of_samples():
    histogram = filled(*[np.random.default_rng(k).normal(size=(8, 64)) for k in range(50)])
    assert histogram.counts.nbytes == 8192 * 8


def test_mse_range_is_near_the_best_by_brute_force():
    values = np.random.default_rng(0).laplace(size=20000).astype(np.float32)
    histogram = filled(values[None])

    def error(low: float, high: float) -> float:
        grid = quant_math.activation_grid(low, high, UINT4.spec)
        return float(np.square(values - grid.round(values)).mean())

    best = min(
        error(values.min() * a, values.max() * b)
        for a in np.linspace(0.1, 1, 40)
        for b in np.linspace(0.1, 1, 40)
    )
    assert error(*mse_range(histogram, UINT4, Config())) < best * 1.05
    assert best < error(values.min(), values.max()) * 0.7


def test_percentile_cuts_the_tails():
    values = np.linspace(-1, 1, 10001)
    values[0] = -100
    low, high = percentile_range(filled(values[None]), UINT8, Config(percentile=99.0))
    assert low == pytest.approx(-0.98, abs=0.03)
    assert high == pytest.approx(0.98, abs=0.03)


def test_values_of_one_sign_start_at_zero():
    grid = quant_math.activation_grid(
        *mse_range(filled(np.abs(np.random.default_rng(0).normal(size=(1, 5000)))), UINT8, Config()),
        UINT8.spec,
    )
    assert grid.zero_point == 0


@pytest.mark.parametrize("method", list(ActivationRange))
def test_ranges_of_a_network(method):
    model = normalize(small_convnet(), 13)
    config = Config(activation_range=method)
    target = targets.load("ort-x64")
    p = plan(model, target, config)
    samples = data.read({"image": images(20)}, model)
    calls: list[tuple[int, int]] = []
    result = calibrate(model, p, samples, config, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (20, 20)
    assert set(result.grids) == {q.name for q in p.activations}
    a1 = result.grids["a1"]
    assert a1.zero_point == 0
    assert float(np.float32(255) * a1.scale) <= 6.0
    logits = Session(model).run({"image": images(20)})["logits"]
    assert result.power["logits"] == pytest.approx(float(np.square(logits).mean()), rel=1e-4)
    assert result.variance["logits"] == pytest.approx(float(logits.var()), rel=1e-3)


def test_left_over_samples_are_counted():
    model = small_convnet()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    model = normalize(model, 13)
    p = plan(model, targets.load("ort-x64"), Config())
    samples = data.read({"image": images(10)}, model)
    assert calibrate(model, p, samples, Config(), silent).unused_samples == 2


def test_the_range_of_a_tensor_looks_through_the_function_that_reads_it():
    """SiLU flattens what is far below zero, so no range is spent on it."""
    text = (
        "g (float[N,3,8,8] x) => (float[N,4,6,6] y) {"
        " a = Conv (x, w)  s = Sigmoid (a)  m = Mul (a, s)  y = Conv (m, v) }"
    )
    model = normalize(parse(text, {"w": normal(4, 3, 3, 3, scale=4), "v": normal(4, 4, 1, 1)}), 13)
    p = plan(model, targets.load("ort-x64"), Config())
    through = {t: q.through for q in p.activations for t in q.tensors}
    assert through["a"] == "m"
    assert through["m"] == "m"
    result = calibrate(model, p, data.read(images(20), model), Config(), silent)
    a = result.grids["a"]
    plain = calibrate(
        model, p, data.read(images(20), model), Config(activation_range="minmax"), silent
    ).grids["a"]
    assert float((0 - a.zero_point) * a.scale) > 0.5 * float((0 - plain.zero_point) * plain.scale)
    assert float(a.scale) < 0.75 * float(plain.scale)


def test_a_tensor_with_two_ways_out_counts_by_itself():
    text = (
        "g (float[N,3,8,8] x) => (float[N,4,6,6] y, float[N,4,6,6] z)"
        " { a = Conv (x, w)  s = Sigmoid (a)  y = Conv (s, v)  z = Conv (a, v) }"
    )
    p = plan(
        normalize(parse(text, {"w": normal(4, 3, 3, 3), "v": normal(4, 4, 1, 1)}), 13),
        targets.load("ort-x64"),
        Config(),
    )
    assert {t: q.through for q in p.activations for t in q.tensors}["a"] == "a"


def test_important_channels_get_the_range_that_suits_them():
    """A large channel that does not matter is clipped in favour of a small one that does."""
    values = np.random.default_rng(0).normal(size=(16, 2, 20, 20)).astype(np.float32) * np.array(
        [10, 0.1], np.float32
    ).reshape(1, 2, 1, 1)
    equal, weighted = Histogram(), Histogram()
    equal.add(values)
    weighted.add(values, importance=np.array([1e-6, 1], np.float32), axis=1)
    assert weighted.counts.sum() == pytest.approx(equal.counts.sum() / 2, rel=1e-3)
    assert mse_range(weighted, UINT4, Config())[1] < 0.1 * mse_range(equal, UINT4, Config())[1]


def test_more_samples_give_fewer_values_each_and_enough_together():
    counts = [1, 16, 32, 64, 128, 256, 10_000]
    each = [values_of_a_sample(n) for n in counts]
    assert each == sorted(each, reverse=True)
    assert each[:3] == [16384] * 3
    assert all(n * one >= 2**19 for n, one in zip(counts[2:], each[2:], strict=True))
