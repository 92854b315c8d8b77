"""Halving: which half is measured, and that nothing is missed where noise does not add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eptq_onnx.numerics.halving import halves


@given(st.lists(st.integers(0, 100), min_size=2, max_size=40))
def test_halves_of_additive_noise_are_exact_whichever_is_measured(noises):
    asked = []

    def noise(begin, end):
        asked.append((begin, end))
        return float(sum(noises[begin:end]))

    found = halves((float(sum(noises)), 0, len(noises)), noise)
    assert [(begin, end) for _, begin, end in found] == [
        (0, len(noises) // 2),
        (len(noises) // 2, len(noises)),
    ]
    assert [own for own, _, _ in found] == [sum(noises[begin:end]) for _, begin, end in found]
    assert len(asked) == (1 if found[1][0] >= found[0][0] else 2)


@pytest.mark.parametrize("loud", [(0, 3), (1, 2), (3,)])
def test_a_half_that_is_loud_is_seen_where_noise_does_not_add_up(loud):
    found = halves((1e30, 0, 4), lambda begin, end: 1e30 if {*loud} & {*range(begin, end)} else 1.0)
    assert [own >= 1e29 for own, _, _ in found] == [min(loud) < 2, max(loud) >= 2]
