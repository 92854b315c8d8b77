from __future__ import annotations

from io import StringIO
from typing import Any

import numpy as np
import pytest
from graphs import images, small_convnet
from rich.console import Console

import eptq_onnx
from eptq_onnx import Config, data, targets
from eptq_onnx.estimates import Estimate
from eptq_onnx.graph import edit
from eptq_onnx.method.estimate import measured, multiplications, values_per_sample
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.runtime import Session


@pytest.fixture(scope="module")
def case():
    model = normalize(small_convnet(), 13)
    return model, plan(model, targets.load("ort-x64"), Config()), data.read(images(20), model)


def test_multiplications_are_those_of_one_sample(case):
    model, p, samples = case
    sizes = {i.name: tuple(i.dims) for i in model.graph.initializer}
    # Every position of an output uses the whole weight.
    outputs = Session(edit.exposing(model, [x.output for x in p.layers])).run(samples.take(np.arange(4)))
    wanted = {
        x.node: np.prod(sizes[x.weight]) * outputs[x.output][0].size / outputs[x.output].shape[x.output_axis]
        for x in p.layers
    }
    assert multiplications(model, p, samples) == pytest.approx(wanted)


def test_the_machine_is_timed(case):
    model, p, samples = case
    rates = measured(model, p, samples, Config())
    assert 0 < rates.a_pass <= rates.a_walk < 1
    assert 0 <= rates.a_build < 10
    assert 0 < rates.an_operation < rates.a_value < 1e-4


@pytest.mark.parametrize("memory", [None, "20kB"])
def test_blocks_are_timed_like_the_whole(case, memory):
    model, p, samples = case
    assert measured(model, p, samples, Config(max_memory=memory)).a_pass > 0


def test_values_are_those_of_one_sample(case):
    model, p, samples = case
    outputs = [x.output for x in p.layers]
    values = Session(edit.exposing(model, outputs)).run(samples.take(np.arange(4)))
    sizes = [values[name][0].size for name in outputs]
    assert values_per_sample(model, outputs, samples) == pytest.approx(sum(sizes))
    assert values_per_sample(model, outputs, samples, 20) == sum(min(n, 20) for n in sizes)


def test_better_presets_cost_more():
    told = {}
    for preset in ("fast", "balanced"):
        found: list[Any] = []
        with pytest.raises(Stop):
            eptq_onnx.quantize(
                small_convnet(),
                images(24),
                Config(preset=preset, weight_bits=4),
                progress=stopping_at_estimate(found),
            )
        told[preset] = str(found[0])
        assert found[0].seconds == pytest.approx(sum(found[0].shares.values()))
    assert "no optimization steps" in told["fast"]
    assert "at most 22 optimization steps" in told["balanced"]


class Stop(Exception):
    pass


def stopping_at_estimate(found):
    def progress(step, done, total, detail=""):
        assert step == "estimate", "the cost is told before anything else"
        found.append(detail)
        raise Stop

    return progress


def test_the_report_tells_what_was_expected():
    report = eptq_onnx.quantize(small_convnet(), images(24), Config(steps=10, patience=0)).report
    assert report.optimization is not None
    assert report.estimate.steps == report.optimization.steps == 10
    assert report.estimate.seconds > 0
    console = Console(record=True, width=200, file=StringIO())
    report.print(console)
    # A machine that is busy makes the run late, which the report says.
    assert f"(expected: {report.estimate.seconds:.0f} s" in console.export_text()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3, "less than 10 seconds"),
        (42, "about 42 seconds"),
        (125, "about 2 minutes"),
        (5400, "about 90 minutes"),
        (9000, "about 2 hours"),
    ],
)
def test_durations_are_round(seconds, text):
    assert str(Estimate(seconds, 7)) == f"{text}, at most 7 optimization steps"
