"""How long the optimization is, whether it starts, and when it ends."""

from __future__ import annotations

from io import StringIO
from typing import Any

import numpy as np
import pytest
from graphs import images, normal, parse, silent, small_convnet
from rich.console import Console

import eptq_onnx
from eptq_onnx import Config, targets
from eptq_onnx.data.samples import Samples
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.training.worth import LITTLE, Effort, promised, views

LONG: dict[str, Any] = {"activation_bits": 4}
"""Options with which the optimization gets more time."""


def _samples(count: int) -> Samples:
    return eptq_onnx.data.read({"image": images(count)}, small_convnet())


def _effort(scored=1000, held=100, **options) -> Effort:
    config, model = Config(**options), normalize(small_convnet(), 13)
    return Effort.of(config, plan(model, targets.load("ort-x64"), config), _samples(4), scored, held)


@pytest.mark.parametrize("scored", [20, 100, 250, 1000, 1024])
@pytest.mark.parametrize(
    ("options", "budget"), [({}, 30), ({"weight_bits": 4}, 30), ({"weight_bits": 3}, 90), (LONG, 90)]
)
def test_a_preset_is_a_budget_that_is_used_and_kept(options, budget, scored):
    effort = _effort(scored, scored // 10, **options)
    assert budget - effort.a_step < effort.passes <= budget
    assert effort.checks[-1] == effort.steps
    assert len(effort.checks) <= 10
    gaps = np.diff([0, *effort.checks])
    assert gaps.max() - gaps.min() <= 1
    assert gaps.min() * effort.a_step > 4


def test_costs_follow_from_numbers_of_samples():
    effort = _effort(1000, 100)
    assert effort.a_step == pytest.approx(10 * 16 / 1000)
    assert effort.a_check == pytest.approx(4 * 100 / 1000)
    assert _effort(1000, 100, augment=True).a_check == pytest.approx(4 * 4 * 100 / 1000)
    assert (views(True), views(False)) == (4, 1)
    assert _effort(64, 8).a_step == pytest.approx(10 * 16 / 128), "few samples count as 128"
    assert effort.spent(0) == effort.a_check
    second = effort.checks[1]
    assert effort.spent(second) == pytest.approx(second * effort.a_step + 3 * effort.a_check)


def test_a_number_of_steps_is_taken_as_it_is():
    effort = _effort(steps=40, preset="fast")
    assert effort.steps == 40
    assert effort.checks == tuple(range(4, 41, 4))
    assert _effort(steps=2).checks == (1, 2)
    assert _effort(steps=7, batch_size=30).batch == 30
    assert _effort(20, 16, steps=7).batch == 4, "no more than there are to train on"


def _replayed(effort: Effort, errors: list[float]) -> tuple[int, str]:
    """Return after how many checks a run with these held-out errors ends, and why."""
    known = {0: 1.0}
    for count, (step, error) in enumerate(zip(effort.checks, errors, strict=False), 1):
        known[step] = error
        why = effort.ending(known, False)
        if why:
            return count, why
    return len(known) - 1, ""


def test_a_run_ends_when_some_float_passes_gain_less_than_one_percent():
    effort = _effort(**LONG, patience=8)
    apart = effort.spent(effort.checks[1]) - effort.spent(effort.checks[0])
    assert apart > effort.patience == 8, "each check is compared with the one before"
    falling = [0.98**k for k in range(1, 11)]
    assert _replayed(effort, falling) == (10, "")
    slower = [0.98, 0.96, 0.952, 0.9]
    assert _replayed(effort, slower) == (3, "stopped as 8 float passes gained less than 1 %")
    just = [0.5, 0.5 * (1 - LITTLE) - 1e-6, 0.5 * (1 - LITTLE)]
    assert _replayed(effort, just)[0] == 3
    assert _replayed(effort, [1.1, 1.2])[0] == 1


def test_a_short_setback_ends_nothing():
    """With checks five passes apart, ten passes are two of them."""
    effort = _effort(patience=10)
    assert 5 < effort.spent(effort.checks[1]) - effort.spent(effort.checks[0]) < 10
    assert _replayed(effort, [0.95, 0.97, 0.93])[0] == 3
    assert _replayed(effort, [1.02, 0.97, 0.93, 0.9])[1] == ""
    assert _replayed(effort, [0.95, 0.97, 0.949])[0] == 3
    assert _replayed(effort, [1.0, 1.0, 1.0])[0] == 2


def test_patience_may_be_endless_and_what_is_clear_ends_at_once():
    effort = _effort(**LONG, patience=0)
    assert _replayed(effort, [1.0] * 10) == (10, "")
    assert effort.ending({0: 1.0, effort.checks[0]: 1.0}, True) == ""
    effort = _effort(**LONG, patience=50)
    assert effort.ending({0: 1.0, effort.checks[0]: 1.0}, True) == "stopped as nothing was to be gained"
    assert effort.ending({0: 1.0, effort.steps: 1.0}, True) == "", "it has come to its end"


@pytest.mark.parametrize(("fixed", "promise"), [(0.0, 0.1), (1.0, 0.025), (1.9, 0.00025), (2.2, 0.0)])
def test_only_what_weights_cause_can_be_removed(fixed, promise):
    total = np.array([[1.0], [3.0]])
    assert promised(total, np.full((2, 1), fixed)) == pytest.approx(promise)
    assert promised(np.zeros((2, 1)), np.zeros((2, 1))) == 0


def _quantized(**options):
    return eptq_onnx.quantize(
        small_convnet(),
        images(96),
        Config(objective="integers", measure_speed=False, **options),
        progress=silent,
    )


def test_at_8_bits_nothing_starts_and_the_report_says_why():
    result = _quantized()
    trace = result.report.optimization
    assert trace is not None
    assert (trace.steps, trace.checkpoints, trace.passes) == (0, (), 0.0)
    assert trace.reason.startswith("not started: next to weights of 7 bits or more, quantized activations")
    console = Console(record=True, width=200, file=StringIO())
    result.report.print(console)
    assert "not started" in console.export_text()
    without = _quantized(steps=0)
    assert [t.raw_data for t in result.model.graph.initializer] == [
        t.raw_data for t in without.model.graph.initializer
    ]


@pytest.mark.parametrize("options", [{"weight_bits": 4}, {"activation_bits": 4}, {"steps": 2}])
def test_it_starts_where_rounding_or_learned_scales_matter_or_steps_are_given(options):
    trace = _quantized(**options).report.optimization
    assert trace is not None
    assert trace.steps > 0
    assert trace.passes > 0


def test_weights_without_rounding_errors_promise_nothing():
    """A network of small integers is the same at 4 bits: the loop has nothing to do."""
    model = parse(
        "g (float[N,3,8,8] image) => (float[N,4,8,8] y) { a = Conv (image, w)  r = Relu (a)  y = Conv (r, v) }",
        {"w": np.sign(normal(8, 3, 1, 1)), "v": np.sign(normal(4, 8, 1, 1))},
    )
    config = Config(weight_bits=4, edge_bits=4, objective="integers", measure_speed=False)
    trace = eptq_onnx.quantize(model, images(40), config, progress=silent).report.optimization
    assert trace is not None
    assert trace.steps == 0


@pytest.mark.parametrize("steps", [1, 19, 225, 226, 1000])
def test_samples_are_varied_only_where_they_are_seen_often(steps):
    """Of 180 samples to train on, 16 are seen in a step."""
    assert _effort(200, 20, steps=steps).augments == (steps > 225)
    assert _effort(200, 20, steps=steps, augment=True).augments
    assert not _effort(200, 20, steps=steps, augment=False).augments
    assert not _effort(200, 20, **LONG).augments
