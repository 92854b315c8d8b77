from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eptq_onnx.numerics.quant_math import layer_units, sqnr_db
from eptq_onnx.numerics.sums import NoiseSum

SPOILS = [None, np.nan, np.inf]


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([1, 5, 70_000]),
    unit=st.floats(1e-30, 1e30),
    noise=st.floats(1e-6, 2),
    spoiled=st.sampled_from(SPOILS),
    other=st.sampled_from(SPOILS),
    seed=st.integers(0, 99),
)
def test_noise_is_that_of_exact_sums_over_what_is_finite(size, unit, noise, spoiled, other, seed):
    random = np.random.default_rng(seed)
    parts = []
    for _ in range(2):
        expected = (unit * random.standard_normal((1, size))).astype(np.float32)
        got = (expected * (1 + noise * random.standard_normal((1, size)))).astype(np.float32)
        parts.append((expected, got))
    if spoiled is not None:
        parts[0][0][0, size // 2] = spoiled
    if other is not None:
        parts[1][1][0, 0] = other
    found, power, error = NoiseSum(), 0.0, 0.0
    for expected, got in parts:
        found.add(expected, got)
        for a, b in zip(expected[0].astype(np.float64), got[0].astype(np.float64), strict=True):
            if np.isfinite(a):
                power += a * a
                error += (a - b) ** 2 if np.isfinite(b) else a * a
    assert found.sqnr_db == pytest.approx(sqnr_db(power, error), abs=0.01)


@settings(max_examples=60, deadline=None)
@given(st.floats(-25, 25), st.floats(-25, 25), st.sampled_from(SPOILS), st.integers(0, 99))
def test_units_bring_values_whose_squares_float32_does_not_hold_near_one(first, second, spoiled, seed):
    random = np.random.default_rng(seed)
    inputs, weight = ((10**k * random.uniform(0.5, 1, 40)).astype(np.float32) for k in (first, second))
    if spoiled is not None:
        inputs[3] = spoiled
    units = layer_units([inputs, inputs[:0]], weight)
    # Far from the limits, nothing changes.
    if all(abs(k) < 14 for k in (first, second, first + second)):
        assert [float(u) for u in units] == [1, 1]
    with np.errstate(over="raise", under="raise", invalid="ignore"):
        known = inputs[np.isfinite(inputs)] / units[0]
        scaled = weight / units[1]
        sums = [float(np.dot(a, b)) for a in (known, scaled) for b in (a,)]
    assert all(np.isfinite(sums))
    assert min(sums) > 1e-30
