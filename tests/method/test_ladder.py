"""The search for the fewest parts to spare."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eptq_onnx.method.ladder import lowest, passed


def test_a_rung_passes_by_its_own_score_and_by_the_smoothed_one():
    # The second is good by chance: its neighbour above is worse.
    assert passed({0: 0.1, 3: 0.01, 5: 0.08, 9: 0.0}, 0.02) == {0: False, 3: False, 5: False, 9: True}
    assert passed({0: 0.1, 3: 0.019, 5: 0.018}, 0.02) == {0: False, 3: True, 5: True}


ladders = st.lists(st.floats(0.5, 0.97), min_size=1, max_size=60).map(lambda steps: np.cumprod([1.0, *steps]))


@given(ladders, st.floats(0.05, 0.9), st.floats(0.5, 2.0))
def test_the_lowest_rung_is_found_in_few_tries(noises, limit, power):
    calls = []

    def drop(k):
        calls.append(k)
        return float(noises[k] ** power)

    found, drops = lowest(list(noises), 1.0, limit, drop, 9)
    assert len(calls) == len(set(calls)) <= 9
    good = [k for k in range(len(noises)) if noises[k] ** power <= limit]
    if not good:
        assert found is None
        return
    assert found is not None
    assert drops[found] <= limit
    # What is found has hardly less noise than the lowest that passes.
    assert noises[found] >= noises[good[0]] / 1.25 or found - good[0] <= 1


@given(ladders, st.integers(0, 10_000))
def test_what_is_found_has_passed_whatever_the_chance(noises, seed):
    rng = np.random.default_rng(seed)
    found, drops = lowest(list(noises), 1.0, 0.3, lambda k: float(noises[k] + rng.normal(0, 0.2)), 9)
    if found is not None:
        assert drops[found] <= 0.3


def test_the_highest_rung_comes_last():
    calls = []

    def drop(k):
        calls.append(k)
        return 1.0

    noises = list(np.linspace(1, 0, 200))
    assert lowest(noises, 1.0, 0.9, drop, 3)[0] is None
    assert calls[-1] == 199


@pytest.mark.parametrize("noises", [[1.0], [1.0, 0.0]])
def test_short_ladders(noises):
    found, _ = lowest(noises, 1.0, 0.0, lambda k: noises[k], 5)
    assert found == (1 if len(noises) > 1 else None)
