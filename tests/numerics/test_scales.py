from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eptq_onnx.numerics.formats import IntFormat, PerAxis
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.numerics.spec import QuantSpec

POWER = ScaleRule.POWER_OF_TWO
SCALES = st.floats(2.0**-140, 2.0**127, width=32, allow_subnormal=True)


@given(SCALES)
def test_powers_of_two_are_the_next_and_the_nearest(scale):
    above, nearest = (float(f(np.array([scale], np.float32))[0]) for f in (POWER.above, POWER.nearest))
    for power in (above, nearest):
        assert np.frexp(np.float32(power))[0] == 0.5
    assert scale <= above < 2 * scale
    assert nearest in (above, above / 2)
    assert abs(nearest - scale) == min(abs(above - scale), abs(above / 2 - scale))


@given(SCALES)
def test_any_scale_stays_as_it_is_and_so_does_a_power(scale):
    value = np.array(scale, np.float32)
    assert ScaleRule.ANY.above(value) == ScaleRule.ANY.nearest(value) == value
    power = POWER.above(value)
    assert POWER.above(power) == POWER.nearest(power) == power


@pytest.mark.parametrize("rule", ScaleRule)
def test_nothing_and_what_is_no_number_stay(rule):
    values = np.array([0, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(rule.above(values), values)
    np.testing.assert_array_equal(rule.nearest(values), values)


def test_the_largest_numbers_stay_finite():
    most = np.array([np.finfo(np.float32).max])
    assert POWER.above(most) == POWER.nearest(most) == np.float32(2.0**127)


def test_grids_obey_the_rule_of_their_spec():
    spec = QuantSpec(IntFormat(8, True, -127, 127), PerAxis(0), scales=POWER)
    grid = spec.grid(np.array([0.3, 0.5, 0.7], np.float32))
    np.testing.assert_array_equal(grid.scale, [0.25, 0.5, 0.5])
    assert grid.scale.dtype == np.float32
