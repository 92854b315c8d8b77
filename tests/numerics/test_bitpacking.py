from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eptq_onnx.numerics.bitpacking import LAYOUTS, offsets


def unpacked(low, above, layout, size):
    """Field by field, by the definition."""
    index = low.astype(int)
    if above is not None:
        parts = [
            (above.astype(int) >> (layout.above * k)) % 2**layout.above for k in range(layout.indices_at_once)
        ]
        index = index + 256 * np.stack(parts, axis=2).reshape(low.shape)
    fields = [(index >> (layout.bits * k)) % 2**layout.bits for k in range(layout.group)]
    return np.stack(fields, axis=2).reshape(len(low), -1)[:, :size]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(LAYOUTS)), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_packed_values_come_back(bits, rows, size, seed):
    layout = LAYOUTS[bits]
    values = np.random.default_rng(seed).integers(0, 2**bits, (rows, size))
    low, above = layout.pack(values)
    np.testing.assert_array_equal(unpacked(low, above, layout, size), values)
    assert low.nbytes + (0 if above is None else above.nbytes) == rows * layout.row_bytes(size)


@pytest.mark.parametrize("bits", sorted(LAYOUTS))
def test_bytes_are_those_of_the_bits(bits):
    assert LAYOUTS[bits].row_bytes(240) == 240 * bits // 8


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_offsets_leave_what_the_width_holds(bits, rows, seed):
    rng = np.random.default_rng(seed)
    least = rng.integers(-128, 129 - 2**bits, (rows, 1))
    values = (least + rng.integers(0, 2**bits, (rows, 12))).astype(np.int8)
    found, offset = offsets(values)
    left = values - offset[:, None]
    assert found <= max(2, bits)
    assert left.min() >= 0
    assert left.max() < 2**found
    assert -128 <= offset.min() <= offset.max() <= 127


def test_signed_integers_have_the_offset_of_their_width():
    bits, offset = offsets(np.array([[-3, 2], [0, 7]], np.int8))
    assert (bits, offset.tolist()) == (3, [-4, 0])


def test_integers_of_all_of_int8_need_8_bits():
    assert offsets(np.array([[-128, 127]], np.int8))[0] == 8
