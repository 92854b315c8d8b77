from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx.parser
import onnx.reference
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from eptq_onnx.numerics import quant_math as qm
from eptq_onnx.numerics.formats import IntFormat, PerAxis, PerTensor
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.numerics.spec import QuantSpec


def unsigned(bits: int) -> QuantSpec:
    return QuantSpec(IntFormat.full(bits, signed=False), zero_points=(0, 2**bits - 1))


INT4 = QuantSpec(IntFormat.full(4, signed=True), PerAxis(0))
UINT8, INT8 = unsigned(8), QuantSpec(IntFormat.full(8, signed=True))
POWER = ScaleRule.POWER_OF_TWO
SHIFTED = replace(INT4, zero_points=(-56, 56))


def test_quantize_is_what_onnx_computes():
    model = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["" : 19]>
    g (float[3,5] x, float[3] s, int8[3] z) => (float[3,5] y)
    { q = QuantizeLinear <axis = 0> (x, s, z)  y = DequantizeLinear <axis = 0> (q, s, z) }
    """)
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32) * 3
    s = np.array([0.01, 0.1, 0.5], np.float32)
    spec = replace(INT8, granularity=PerAxis(0))
    (y,) = onnx.reference.ReferenceEvaluator(model).run(None, {"x": x, "s": s, "z": np.zeros(3, np.int8)})
    np.testing.assert_array_equal(spec.grid(s).round(x), y)


@given(
    hnp.arrays(np.float32, (4, 6), elements=st.floats(-100, 100, width=32)),
    st.sampled_from([2, 3, 4, 8]),
)
def test_mse_scales_are_never_worse_than_the_maximum(weight, bits):
    spec = QuantSpec(IntFormat.full(bits, signed=True), PerAxis(0))
    scales = qm.weight_scales(weight, spec)
    assert scales.shape == (4,)
    assert (scales > 0).all()
    largest = np.where(weight.any(axis=1), qm.max_scales(weight, spec), 1).astype(np.float32)
    for row, chosen, plain in zip(weight, scales, largest, strict=True):
        of_row = QuantSpec(spec.format)
        errors = [np.square(row - of_row.grid(s.reshape(())).round(row)).sum() for s in (chosen, plain)]
        assert errors[0] <= errors[1] * (1 + 1e-4) + 1e-12


def test_importance_moves_the_scale_and_damping_holds_it():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(1, 200)).astype(np.float32)
    weight[0, 0] = 8.0
    blind = np.where(np.abs(weight) > 5, 0, 1).astype(np.float32)
    free = qm.weight_scales(weight, INT4, blind, damping=0.0)
    damped = qm.weight_scales(weight, INT4, blind, damping=0.5)
    plain = qm.weight_scales(weight, INT4)
    assert free[0] < damped[0] <= plain[0] * 1.001


@pytest.mark.parametrize("spec", [INT4, SHIFTED])
def test_a_channel_of_zeros_has_scale_one(spec):
    zeros = np.zeros((2, 3), np.float32)
    np.testing.assert_array_equal(qm.weight_scales(zeros, spec), [1, 1])
    ones = np.ones(2, np.float32)
    np.testing.assert_array_equal(spec.grid(ones, qm.zero_points(zeros, ones, spec)).round(zeros), zeros)


def _on_best_grid(weight: np.ndarray, spec: QuantSpec) -> np.ndarray:
    scale = qm.weight_scales(weight, spec)
    return spec.grid(scale, qm.zero_points(weight, scale, spec)).round(weight)


def test_zero_points_serve_lopsided_channels():
    weight = np.random.default_rng(0).uniform(-0.2, 1, (32, 9)).astype(np.float32)
    weight[::2] *= -1
    errors = [np.square(_on_best_grid(weight, spec) - weight).sum() for spec in (INT4, SHIFTED)]
    assert errors[1] < 0.5 * errors[0]


@given(hnp.arrays(np.float32, (4, 6), elements=st.floats(-100, 100, width=32)), st.sampled_from([2, 3, 4]))
def test_folded_weights_are_the_same_and_fit_the_target(weight, bits):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    spec = QuantSpec(IntFormat(bits, True, low, high), PerAxis(0), (high - 63, low + 64))
    scale = qm.weight_scales(weight, spec)
    grid = spec.grid(scale, qm.zero_points(weight, scale, spec))
    integers = grid.in_container(weight)
    assert low <= integers.min() <= integers.max() <= high
    stored, symmetric = qm.folded(integers, grid)
    assert -64 <= stored.min() <= stored.max() <= 63
    assert not np.any(symmetric.zero_point)
    np.testing.assert_array_equal(symmetric.dequantize(stored), grid.dequantize(integers))
    largest = np.abs(weight).max(axis=1, keepdims=True)
    assert (np.abs(_on_best_grid(weight, spec) - weight) <= largest + 1e-6).all()


@given(st.floats(-50, 0), st.floats(0, 50), st.sampled_from([UINT8, INT8, unsigned(4)]))
def test_zero_is_always_representable(low, high, spec):
    grid = qm.activation_grid(low, high, spec)
    assert float(grid.scale) > 0
    assert spec.qmin <= grid.zero_point <= spec.qmax
    assert grid.round(np.zeros(1, np.float32))[0] == 0


@given(st.floats(0.125, 20, width=32), st.sampled_from([0.0, -1.0, -2.5]), st.floats(0.1, 3))
def test_inside_bounds_leaves_no_value_outside(high, low, stretch):
    grid = qm.activation_grid(low * stretch, high * stretch, UINT8, (low, high))
    ends = grid.dequantize(np.array([0, 255], np.int32))
    assert ends[0] >= np.float32(low)
    assert ends[1] <= np.float32(high)


@pytest.mark.parametrize("size", [100, 1000, 12345])
def test_stride_avoids_image_sizes(size):
    step = qm.stride(size, 10)
    assert step == 1 or all(step % p for p in (2, 3, 5, 7))


@given(
    hnp.arrays(
        np.float32,
        (3, 6),
        elements=st.one_of(
            st.just(0.0), st.floats(2.0**-30, 100, width=32), st.floats(-100, -(2.0**-30), width=32)
        ),
    ),
    st.sampled_from(
        [INT4, SHIFTED, replace(INT8, granularity=PerAxis(0)), replace(INT4, granularity=PerTensor())]
    ),
)
def test_weights_get_the_power_of_two_of_least_error(weight, spec):
    spec = replace(spec, scales=POWER)
    scales = qm.weight_scales(weight, spec)
    assert scales.shape == (() if spec.axis is None else (3,))
    assert (np.frexp(scales)[0] == 0.5).all()

    def errors(scale: np.ndarray) -> np.ndarray:
        grid = spec.grid(scale, qm.zero_points(weight, scale, spec))
        squares = np.square((weight - grid.round(weight)).astype(np.float64))
        return squares.sum() if spec.axis is None else squares.sum(axis=1)

    chosen = errors(scales)
    for factor in (0.25, 0.5, 2, 4):
        assert (chosen <= errors(scales * np.float32(factor)) * (1 + 1e-4) + 1e-12).all()


@pytest.mark.parametrize("value", [0.0, 1e-42, -1e-30, 3e38])
def test_powers_of_two_survive_zeros_and_extreme_numbers(value):
    weight = np.full((2, 3), value, np.float32)
    for spec in (INT4, SHIFTED, INT8, UINT8):
        powers = replace(spec, scales=POWER)
        with np.errstate(over="ignore"):
            scale = (
                qm.weight_scales(weight, powers)
                if spec is not UINT8
                else qm.activation_grid(value, value, powers).scale
            )
        assert np.isfinite(scale).all()
        assert (np.frexp(scale)[0] == 0.5).all()


@given(
    st.floats(-50, 0),
    st.floats(0, 50),
    st.sampled_from([UINT8, INT8, QuantSpec(IntFormat.full(16, signed=True))]),
)
def test_activations_get_a_power_of_two_that_covers_their_range(low, high, spec):
    grid = qm.activation_grid(low, high, replace(spec, scales=POWER))
    assert np.frexp(grid.scale)[0] == 0.5
    ends = grid.round(np.array([low, high], np.float32))
    np.testing.assert_allclose(ends, [low, high], rtol=0, atol=float(grid.scale) * 0.5001)
    assert float(grid.scale) < 2 * max(float(qm.activation_grid(low, high, spec).scale), 1e-30) * (1 + 1e-6)


def test_only_zero_and_infinity_are_kept_by_powers_of_two():
    powers = replace(UINT8, scales=POWER)
    assert qm.keeps_bounds(powers, (0.0, np.inf))
    assert not qm.keeps_bounds(powers, (0.0, 6.0))
    assert qm.keeps_bounds(UINT8, (0.0, 6.0))
    assert not qm.keeps_bounds(INT8, (0.0, np.inf)), "its zero point cannot move"
    assert qm.activation_grid(0.0, 6.0, powers, (0.0, 6.0)) == qm.activation_grid(0.0, 6.0, powers)
    assert float(qm.activation_grid(0.0, 6.0, powers, (0.0, 6.0)).scale) == 2.0**-5


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([], True),
        ([1, -1], True),
        ([3e38, 3e38], True),
        ([np.inf, 1], False),
        ([np.inf, -np.inf], False),
        ([np.nan, 1], False),
    ],
)
def test_values_whose_sum_overflows_are_finite_and_nobody_is_warned(values, finite):
    assert qm.all_finite(np.array(values, np.float32)) is finite
