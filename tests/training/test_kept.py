"""Which candidate of the optimization is kept, and when the loop ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from eptq_onnx.records import Rounding
from eptq_onnx.training.kept import Balance, Kept, is_accepted, is_better


@pytest.mark.parametrize(
    ("share", "layers", "outputs"), [(0.5, 0.5, 0.5), (0.0, 1.0, 0.0), (1.0, 0.0, 1.0), (0.2, 0.8, 0.2)]
)
def test_the_loss_of_the_start_is_one_of_which_the_outputs_have_their_share(share, layers, outputs):
    errors = np.random.default_rng(0).uniform(1, 2, (3, 40)).astype(np.float32) * np.array(
        [[7.0], [0.01], [1.0]], np.float32
    )
    balance = Balance.of(errors, share)
    np.testing.assert_allclose(balance(errors)[0].sum(), 1)
    np.testing.assert_allclose(balance(errors)[1], errors[2])
    halved = (
        balance(errors * np.array([[0.5], [1.0], [1.0]]))[0].sum(),
        balance(errors * np.array([[1.0], [0.5], [1.0]]))[0].sum(),
    )
    np.testing.assert_allclose(halved, (1 - layers / 2, 1 - outputs / 2))


@pytest.mark.parametrize(
    ("share", "errors", "shares"),
    [(0.5, (2, 0), (1, 0)), (1.0, (2, 0), (1, 0)), (0.5, (0, 2), (0, 1)), (0.5, (0, 0), (0, 0))],
)
def test_what_has_no_errors_has_no_share(share, errors, shares):
    balance = Balance.of(np.array([[errors[0]], [errors[1]], [0]], np.float32), share)
    np.testing.assert_allclose(balance.shares, shares)
    assert np.isfinite(balance.units).all()


def test_layers_in_the_middle_do_not_gain_at_the_cost_of_the_outputs():
    errors = np.random.default_rng(0).uniform(1, 2, (2, 40)).astype(np.float32)
    gain = np.array([[0.9], [1.0]], np.float32)
    assert is_accepted(errors * gain, errors)
    assert not is_accepted(errors * np.array([[0.9], [1.01]], np.float32), errors)
    assert not is_accepted(errors * gain[::-1], errors), "the outputs alone do not decide either"


def test_only_what_beats_chance_is_better():
    rng = np.random.default_rng(0)
    before = rng.uniform(1, 2, 20).astype(np.float32)
    assert is_better(before * np.float32(0.9), before)
    assert not is_better(before, before)
    loud = np.where(np.arange(20) == 3, np.float32(0.1), before * np.float32(1.01)).astype(np.float32)
    assert loud.mean() < before.mean()
    assert not is_better(loud, before), "one loud sample must not decide"
    assert is_better(before[:1] - 1e-3, before[:1])


def _rounding(label: object) -> Any:
    """What stands for a rounding: nothing looks into it."""
    return label


def replayed(losses, outputs, noise=0.0, count=26, seed=0):
    """Return the errors that a run's checks find on held-out samples, as multiples of the start's."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(1, 2, (2, count)).astype(np.float32)
    kept = Kept(_rounding("start"), start)
    for step, factors in enumerate(zip(losses, outputs, strict=True), 1):
        kept.offer(
            step,
            _rounding(step),
            (start * np.array(factors)[:, None] * rng.uniform(1 - noise, 1 + noise, start.shape)).astype(
                np.float32
            ),
        )
        if kept.is_settled:
            break
    return kept, step


@pytest.mark.parametrize(
    ("losses", "outputs", "ends", "why"),
    [
        (
            [1.01, 1.02, 0.5],
            [0.9, 0.9, 0.5],
            2,
            "error on held-out samples (best +1.0 % in 2 of 3 steps)",
        ),
        (
            [0.9, 0.8, 0.5],
            [1.1, 1.2, 0.5],
            2,
            "error of the outputs on held-out samples (best +10.0 % in 2 of 3 steps)",
        ),
        ([1.3, 1.2, 1.1, 1.15], [1, 1, 1, 1], 4, "error on held-out samples (best +10.0 % in 4 of 4 steps)"),
        (
            [0.9, 0.8, 0.7],
            [1.3, 1.2, 1.25],
            3,
            "error of the outputs on held-out samples (best +20.0 % in 3 of 3 steps)",
        ),
        (
            [0.999, 1.3, 1.3],
            [1.1, 0.9, 1.1],
            3,
            "error on held-out samples by more than chance without raising that of the outputs "
            "(best -0.1 % in 3 of 3 steps)",
        ),
    ],
)
def test_the_loop_ends_when_the_start_will_be_kept(losses, outputs, ends, why):
    kept, ran = replayed(losses, outputs)
    assert (kept.step, ran) == (0, ends)
    assert kept.reason(f"{ran} of {len(losses)} steps") == f"the start was kept: no step lowered the {why}"


@pytest.mark.parametrize("seed", range(30))
def test_the_loop_goes_on_while_errors_fall_and_after_a_gain(seed):
    """A late gain is found if the errors fell, and the rule never ends a run that has gained."""
    rng = np.random.default_rng(seed)
    falling = np.sort(rng.uniform(1.0, 1.5, 5))[::-1] * np.array([1, 1, 1, 1, 0.5])
    kept, ran = replayed(falling, falling, seed=seed)
    assert (kept.step, ran) == (5, 5)
    kept, ran = replayed([0.5, *rng.uniform(1, 2, 6)], [0.5, *rng.uniform(1, 2, 6)], seed=seed)
    assert (kept.step, ran) == (1, 7)


@pytest.mark.parametrize("seed", range(30))
def test_the_loop_ends_early_only_where_the_start_is_kept(seed):
    """Random runs that the rule ends had no gain so far, and would have had none without the rule."""
    rng = np.random.default_rng(seed)
    losses, outputs = rng.uniform(0.8, 1.2, (2, 10))
    kept, ran = replayed(losses, outputs, noise=0.1, seed=seed)
    assert kept.step == 0 or ran == 10
    assert np.isfinite([*kept.checkpoints.values()]).all()
    assert kept.reason("10 of 10 steps").startswith(
        "the start was kept: " if not kept.step else f"step {kept.step} was kept: "
    )


def test_a_start_without_errors_is_kept_without_a_division_by_zero():
    kept = Kept(_rounding("start"), np.zeros((2, 8), np.float32))
    for step in (1, 2):
        kept.offer(step, _rounding(step), np.ones((2, 8), np.float32))
    assert kept.is_settled
    assert kept.reason("2 of 10 steps").startswith("the start was kept: no step lowered the error")


def _settled(candidate, variant, count=26):
    """Settle between a start, a candidate and its variant, whose errors are multiples of the start's."""
    rng = np.random.default_rng(0)
    start = rng.uniform(1, 2, (2, count)).astype(np.float32)
    kept = Kept(_rounding("start"), start)
    kept.offer(1, _rounding("candidate"), (start * np.array(candidate, np.float32)[:, None]))
    kept.settle(_rounding("variant"), (start * np.array(variant, np.float32)[:, None]))
    return kept


@pytest.mark.parametrize(
    ("candidate", "variant", "chosen"),
    [
        ((0.9, 0.95), (0.9, 0.9), "variant"),
        ((0.9, 0.95), (1.1, 0.9), "candidate"),
        ((0.9, 0.95), (0.9, 1.1), "candidate"),
        ((0.9, 1.0), (0.9, 0.9), "variant"),
        ((0.8, 0.8), (0.85, 0.81), "variant"),
        ((0.8, 0.8), (0.75, 0.83), "candidate"),
        ((0.9, 1.0), (1.1, 0.9), "start"),
        ((0.9, 1.0), (0.9, 1.0), "start"),
    ],
)
def test_the_outputs_must_gain_as_well_in_the_end(candidate, variant, chosen):
    kept = _settled(candidate, variant)
    assert kept.rounding == chosen
    assert kept.step == (chosen != "start")
    told = kept.reason("9 of 9 steps")
    if chosen == "start":
        assert told == (
            "the start was kept: the outputs gained no more than by chance on held-out samples (9 of 9 steps)"
        )
    else:
        assert told.startswith("step 1 was kept")


def test_without_outputs_to_compare_the_layers_decide():
    start = np.stack([np.random.default_rng(0).uniform(1, 2, 26), np.zeros(26)]).astype(np.float32)
    kept = Kept(_rounding("start"), start)
    kept.offer(1, _rounding("candidate"), start * np.float32(0.9))
    kept.settle(_rounding("variant"), start * np.float32(1.1))
    assert kept.step == 1
    assert kept.rounding == _rounding("candidate")


def test_what_was_kept_is_settled_alike_after_an_interruption():
    rng = np.random.default_rng(0)
    start = rng.uniform(1, 2, (2, 26)).astype(np.float32)
    kept, again = Kept(_start(), start), Kept(_start(), start)
    kept.offer(3, _start(), start * np.float32(0.9))
    again.restore(kept.saved())
    for one in (kept, again):
        one.settle(_rounding("variant"), start * np.float32(1.1))
    assert (kept.step, again.step) == (3, 3)
    assert kept.reason("") == again.reason("")


def _start() -> Rounding:
    return Rounding({}, {}, {}, {}, {})
