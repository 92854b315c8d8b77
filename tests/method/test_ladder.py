"""The search for the fewest parts to spare."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eptq_onnx.method.ladder import fitted, lowest

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
    assert noises[found] >= 0.9 * noises[good[0]] or found - good[0] <= 1


@given(ladders, st.integers(0, 10_000))
def test_what_is_found_has_passed_whatever_the_chance(noises, seed):
    rng = np.random.default_rng(seed)
    found, drops = lowest(list(noises), 1.0, 0.3, lambda k: float(noises[k] + rng.normal(0, 0.2)), 9)
    if found is not None:
        assert drops[found] <= 0.3


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_what_is_found_keeps_the_limit_on_other_samples_more_often_than_a_search_for_the_first_pass(power):
    """Scores of a thousand samples: the drop is 2.5 points, a point is allowed, and chance makes half of one."""
    noises = list(0.9 ** np.arange(40))
    rng = np.random.default_rng(0)

    def true(k):
        return 0.025 * noises[k] ** power

    missed = first = 0
    for _ in range(300):
        found, _drops = lowest(noises, 0.025, 0.01, lambda k: true(k) + rng.normal(0, 0.005), 9)
        missed += found is None or true(found) > 0.0125
        first += true(next(k for k in range(1, 40) if true(k) + rng.normal(0, 0.005) <= 0.01)) > 0.0125
    assert missed < 0.2 * 300
    assert missed < 0.3 * first


def test_outputs_that_are_lost_say_nothing_of_the_others():
    assert fitted([1.0, 0.5], {0: np.inf}).tolist() == [np.inf, np.inf]
    noises = list(0.8 ** np.arange(30))
    found, drops = lowest(noises, np.inf, 0.1, lambda k: np.inf if k < 5 else noises[k], 9)
    assert found is not None
    assert drops[found] <= 0.1


def test_the_highest_rung_comes_last():
    calls = []

    def drop(k):
        calls.append(k)
        return 1.0

    noises = list(np.linspace(1, 0.5, 200))
    assert lowest(noises, 1.0, 0.9, drop, 3)[0] is None
    assert calls[-1] == 199


@pytest.mark.parametrize("noises", [[1.0], [1.0, 0.0]])
def test_short_ladders(noises):
    found, _ = lowest(noises, 1.0, 0.0, lambda k: noises[k], 5)
    assert found == (1 if len(noises) > 1 else None)
