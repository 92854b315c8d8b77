"""Integer biases: int32 at the product of scales, int8 with a scale of its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eptq_onnx.numerics.biases import BiasSpec, bias_scale
from eptq_onnx.numerics.formats import IntFormat
from eptq_onnx.numerics.quant_math import activation_grid, prescribed_grid
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.numerics.spec import QuantSpec

X, W = np.asarray(2.0**-5, np.float32), np.asarray(2.0**-7, np.float32)
BIAS = np.array([0.5, -1.25, 3.0, 0.01], np.float32)


def test_int32_biases_have_the_product_of_scales():
    spec, weights = BiasSpec(), np.array([0.01, 0.02, 0.5, 3.0], np.float32)
    np.testing.assert_array_equal(spec.scale(BIAS, X, weights), bias_scale(X, weights))
    integers = spec.integers(BIAS, X, weights)
    assert integers.dtype == np.int32
    np.testing.assert_allclose(
        integers * bias_scale(X, weights), BIAS, atol=float(bias_scale(X, weights).max()) / 2
    )
    np.testing.assert_array_equal(spec.round(BIAS, X, weights), np.float32(integers) * bias_scale(X, weights))


@given(st.integers(-20, 20), st.integers(0, 99))
def test_int8_biases_have_a_power_of_two_that_the_shift_reaches(exponent, seed):
    spec = BiasSpec("int8", ScaleRule.POWER_OF_TWO)
    bias = np.random.default_rng(seed).normal(0, 2.0**exponent, 6).astype(np.float32)
    scale, product = float(spec.scale(bias, X, W)), float(X * W)
    assert np.frexp(scale)[0] == 0.5
    assert 1 <= scale / product <= 2**15
    integers = spec.integers(bias, X, W)
    assert integers.dtype == np.int8
    fits = np.abs(bias).max() <= 127 * scale
    # A bias fits unless the largest shift does not reach; then the weight scale has to grow.
    assert fits == (spec.least_weight_scale(bias, X).max() <= W)
    if fits:
        np.testing.assert_allclose(spec.round(bias, X, W), bias, atol=scale / 2)


@pytest.mark.parametrize("container", ["int32", "int8"])
def test_the_least_weight_scale_keeps_a_bias_in_range(container):
    spec = BiasSpec(container, ScaleRule.POWER_OF_TWO)
    bias = np.array([1e6, -3e5], np.float32)
    least = ScaleRule.POWER_OF_TWO.above(spec.least_weight_scale(bias, X).max(keepdims=True))[0]
    rounded = spec.round(bias, X, np.asarray(least))
    np.testing.assert_allclose(rounded, bias, rtol=0.02)


@pytest.mark.parametrize(
    ("reach", "bits", "signed", "symmetric", "scale", "zero"),
    [
        ((0, 1), 8, False, False, 1 / 256, 0),
        ((0, 1), 8, True, False, 1 / 256, -128),
        ((0, 1), 16, False, False, 1 / 65536, 0),
        ((-1, 1), 8, False, False, 1 / 128, 128),
        ((-1, 1), 16, False, False, 1 / 32768, 32768),
        ((-1, 1), 8, True, True, 1 / 128, 0),
        ((0, 1), 8, True, True, 1 / 128, 0),
    ],
)
def test_prescribed_ranges_are_divided_evenly(reach, bits, signed, symmetric, scale, zero):
    form = IntFormat.full(bits, signed=signed)
    spec = QuantSpec(form, zero_points=(0, 0) if symmetric else (form.qmin, form.qmax))
    grid = prescribed_grid(reach, spec)
    assert (float(grid.scale), grid.zero_point) == (scale, zero)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (0.0, 1e-7), (-1e-7, 0.0), (-2.0, 3.0)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_are_at_least_the_smallest_that_a_runtime_takes(low, high, symmetric):
    form = IntFormat.full(8, signed=symmetric)
    zero_points = (0, 0) if symmetric else (form.qmin, form.qmax)
    grid = activation_grid(low, high, QuantSpec(form, zero_points=zero_points, least_range=1e-4))
    assert float(grid.scale) * 255 >= 1e-4 * (1 - 1e-6)
