"""Weights during optimization: their starting points, and gradients against finite differences."""

from __future__ import annotations

import numpy as np
import pytest

from eptq_onnx.numerics import quant_math, rounding
from eptq_onnx.numerics.formats import E4M3, E5M2, FloatFormat, IntFormat, PerAxis
from eptq_onnx.numerics.rounding import SoftWeight, StraightThroughWeight
from eptq_onnx.numerics.spec import QuantSpec

SPEC = QuantSpec(IntFormat.full(4, signed=True), PerAxis(0), (-56, 56))
ZERO = np.array([0, 5, -3], np.int32)


@pytest.mark.parametrize("kind", [SoftWeight, StraightThroughWeight])
def test_a_weight_starts_at_the_given_integers(kind):
    weight = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    grid = SPEC.grid(np.array([0.1, 0.2, 0.05], np.float32), ZERO)
    start = np.random.default_rng(1).integers(-8, 8, weight.shape).astype(np.int32)
    integers, hard = kind(quant_math.continuous(weight, start, grid), grid, SPEC).harden()
    np.testing.assert_array_equal(integers, start)
    np.testing.assert_array_equal(hard.scale, grid.scale)
    np.testing.assert_array_equal(hard.zero_point, ZERO)


@pytest.mark.parametrize("kind", [SoftWeight, StraightThroughWeight])
@pytest.mark.parametrize("form", [E4M3, E5M2, FloatFormat(2, 1)], ids=lambda form: form.type_name)
def test_a_weight_of_unequal_steps_starts_at_the_given_numbers_and_moves_to_neighbours(kind, form):
    spec = QuantSpec(form, PerAxis(0))
    grid = spec.grid(np.array([0.1, 0.2, 0.05], np.float32))
    weight = np.random.default_rng(0).normal(0, form.largest / 20, (3, 40)).astype(np.float32)
    start = grid.in_container(weight)
    learned = kind(quant_math.continuous(weight, start, grid), grid, spec)
    values, _ = learned.harden()
    np.testing.assert_array_equal(values, start)
    learned.forward()
    slope, _ = learned.backward(np.ones_like(weight), 0.0, 2.0)
    assert (slope >= 0).all()
    learned.variable += np.float32(100 if kind is SoftWeight else 1)
    moved, _ = learned.harden()
    steps = form.position(moved) - form.position(start)
    assert set(np.unique(steps)) <= {0, 1}
    assert steps.any()


@pytest.mark.parametrize("spec", [SPEC, QuantSpec(FloatFormat(3, 2), PerAxis(0))], ids=["integers", "floats"])
def test_a_soft_weight_starts_at_the_float_weight_and_its_gradients_are_right(spec):
    weight = np.random.default_rng(0).normal(0, 0.3, (3, 20)).astype(np.float32)
    scale = np.array([0.1, 0.2, 0.15], np.float32)
    zero = ZERO if spec is SPEC else np.zeros_like(ZERO)
    weight -= (zero * scale)[:, None]
    steps = weight / scale[:, None] + zero[:, None]
    soft = SoftWeight(spec.format.position(steps), spec.grid(scale, zero), spec)
    np.testing.assert_allclose(soft.forward(), weight, atol=2e-3)
    v = np.random.default_rng(1).normal(size=weight.shape).astype(np.float32)

    def loss() -> float:
        return float((v * soft.forward()).sum(dtype=np.float64)) + 0.3 * soft.penalty(4.0)

    loss()
    d_alpha, d_gamma = soft.backward(v, 0.3, 4.0)
    direction = np.random.default_rng(2).choice([-1.0, 1.0], size=weight.shape).astype(np.float32)
    for value, gradient, along in (
        (soft.variable, d_alpha, direction),
        (soft.gamma, d_gamma, np.array([1, -1, 1], np.float32)),
    ):
        kept = value.copy()
        ends = []
        for sign in (1, -1):
            value[...] = kept + sign * 1e-3 * along
            ends.append(loss())
        value[...] = kept
        assert float((gradient * along).sum()) == pytest.approx(
            (ends[0] - ends[1]) / 2e-3, rel=3e-2, abs=1e-2
        )


def test_rectified_sigmoid_and_its_inverse():
    h = np.linspace(0.001, 0.999, 101, dtype=np.float32)
    np.testing.assert_allclose(
        rounding.rectified_sigmoid(rounding.rectified_sigmoid_inverse(h)), h, atol=1e-5
    )
    assert rounding.rectified_sigmoid(np.array([-10, 10], np.float32)).tolist() == [0, 1]


@pytest.mark.parametrize("exponent", [2.0, 5.0, 20.0])
def test_slopes_agree_with_finite_differences(exponent):
    a = np.linspace(-2.0, 2.0, 41).astype(np.float32) + np.float32(0.013)
    step = np.float32(1e-2)
    numeric = (rounding.rectified_sigmoid(a + step) - rounding.rectified_sigmoid(a - step)) / (2 * step)
    np.testing.assert_allclose(rounding.rectified_sigmoid_slope(a), numeric, atol=2e-4)
    h = np.linspace(0.05, 0.95, 10).astype(np.float32)
    for k in range(len(h)):
        up, down = h.copy(), h.copy()
        up[k] += 1e-3
        down[k] -= 1e-3
        slope = (rounding.rounding_penalty(up, exponent) - rounding.rounding_penalty(down, exponent)) / float(
            up[k] - down[k]
        )
        assert rounding.rounding_penalty_slope(h, exponent)[k] == pytest.approx(slope, abs=2e-2)


def test_penalty_is_zero_once_all_is_decided():
    assert rounding.rounding_penalty(np.array([0, 1, 1], np.float32), 2.0) == 0
    assert rounding.rounding_penalty(np.array([0.5], np.float32), 2.0) == 1
