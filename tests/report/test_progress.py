"""The remaining time is right when the estimate is, corrected when it is not, and never nonsense."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eptq_onnx.report.progress import Remaining


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(expected: dict[str, float], taken: dict[str, float], units: int = 50):
    """Yield the actual and the estimated remaining time as the run goes on."""
    clock = Clock()
    remaining = Remaining(clock)
    remaining.update("estimate", 1, 1)
    remaining.expect(expected)
    end = clock.now + sum(taken.values())
    for step, seconds in taken.items():
        for k in range(units):
            clock.now += seconds / units
            remaining.update(step, k + 1, units)
            yield end - clock.now, remaining.seconds(), step


PLAN = {"calibrate": 10.0, "score": 5.0, "closed form": 30.0, "optimize": 100.0}


def test_a_right_estimate_is_right_throughout():
    for left, told, _ in run(PLAN, PLAN):
        assert told == pytest.approx(left, abs=1e-6)


@pytest.mark.parametrize("factor", [0.2, 0.5, 2.0, 5.0])
def test_a_wrong_estimate_is_corrected(factor):
    """If all steps are slower by the same factor, the first step and part of the second reveal it."""
    taken = {step: factor * seconds for step, seconds in PLAN.items()}
    for left, told, step in run(PLAN, taken):
        if step == "optimize" and left < 0.5 * taken["optimize"]:
            assert told == pytest.approx(left, rel=0.15, abs=0.5)


def test_the_correction_of_finished_steps_is_that_of_steps_to_come():
    taken = {step: 3 * seconds for step, seconds in PLAN.items()}
    at_the_start = next(told for _, told, step in run(PLAN, taken) if step == "optimize")
    assert 1.5 * PLAN["optimize"] < at_the_start < taken["optimize"]


def test_a_step_that_ends_early_or_is_left_out_leaves_what_follows_alone():
    clock = Clock()
    remaining = Remaining(clock)
    remaining.expect({"a": 10.0, "left out": 1000.0, "b": 100.0, "c": 50.0})
    clock.now += 10
    remaining.update("a", 1, 1)
    clock.now += 20
    remaining.update("b", 20, 100)
    clock.now += 0.0
    remaining.update("c", 0, 10)
    assert remaining.seconds() == pytest.approx(50, rel=0.05)


def test_steps_that_nobody_expected_are_extrapolated():
    clock = Clock()
    remaining = Remaining(clock)
    assert remaining.seconds() is None
    remaining.update("known", 1, 1)
    clock.now += 10
    remaining.update("surprise", 1, 4)
    assert remaining.seconds() == pytest.approx(30, rel=0.25)
    remaining.update("surprise", 2, 4)
    assert remaining.seconds() == pytest.approx(10, rel=0.15)


def test_one_step_that_was_badly_foreseen_does_not_spoil_the_others():
    taken = {**PLAN, "score": 50.0}
    for left, told, step in run(PLAN, taken):
        if step == "optimize":
            assert told == pytest.approx(left, rel=0.5)


def test_a_step_that_hangs_does_not_count_below_zero():
    clock = Clock()
    remaining = Remaining(clock)
    remaining.expect({"a": 10.0, "b": 5.0})
    remaining.update("a", 0, 10)
    clock.now += 1000
    told = remaining.seconds()
    assert told is not None
    assert told >= 5


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1e6), max_size=6),
    st.lists(
        st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 10), st.integers(0, 10), st.floats(0, 1e5)),
        max_size=30,
    ),
)
def test_whatever_is_reported_the_time_left_is_a_number(expected, reports):
    clock = Clock()
    remaining = Remaining(clock)
    remaining.expect(expected)
    for step, done, total, passed in reports:
        clock.now += passed
        remaining.update(step, done, total)
        told = remaining.seconds()
        assert told is None or (math.isfinite(told) and told >= 0)
