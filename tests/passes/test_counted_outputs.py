"""Outputs that do not count: what happens in auxiliary heads is neither measured nor judged."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import images, normal, parse, silent

import eptq_onnx
from eptq_onnx import Config, ConfigError, data
from eptq_onnx.execute.deviation import Deviation
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.normalize import normalize
from eptq_onnx.ops import output_parts
from eptq_onnx.report.verdict import Assurance


def two_heads():
    """The auxiliary head turns every error into noise: a sine of large values."""
    return parse(
        """
        g (float[N,3,8,8] image) => (float[N,4,8,8] main, float[N,4,8,8] auxiliary) {
            a = Conv (image, w)  r = Relu (a)  main = Conv (r, v)
            b = Conv (r, u)  large = Mul (b, thousand)  auxiliary = Sin (large)
        }
        """,
        {
            "w": normal(8, 3, 1, 1, seed=1),
            "v": normal(4, 8, 1, 1, seed=2),
            "u": normal(4, 8, 1, 1, seed=3),
            "thousand": np.array(1e3, np.float32),
        },
    )


def run(**options):
    config = Config(preset="fast", **options)
    return eptq_onnx.quantize(two_heads(), images(32), config, progress=silent)


def test_only_named_outputs_count():
    report = run().report
    assert report.verdict.assurance is Assurance.LOSS
    assert any("auxiliary" in reason for reason in report.verdict.reasons)
    report = run(outputs="main").report
    assert report.verdict.assurance is not Assurance.LOSS
    assert list(report.verification.outputs) == ["main"]
    assert report.config["outputs"] == ["main"]


@pytest.mark.parametrize(("outputs", "parts"), [("", ["main", "auxiliary"]), ("main", ["main"])])
def test_noise_is_that_of_the_outputs_that_count(outputs, parts):
    model = normalize(two_heads(), 13)
    samples = data.read({"image": images(8)}, model)
    variance = {"main": 1.0, "auxiliary": 1.0}
    found = Deviation(model, samples, np.arange(8), 8, variance, Config(outputs=outputs))
    assert found.parts == parts


def test_all_outputs_named_are_all_outputs():
    everything = run(outputs=["auxiliary,main"])
    assert everything.model.graph == run().model.graph
    assert set(everything.report.verification.outputs) == {"main", "auxiliary"}


def test_an_unknown_output_is_refused_with_those_that_exist():
    with pytest.raises(ConfigError, match="no output mian; its outputs are main, auxiliary"):
        run(outputs=["main", "mian"])


def test_gradients_are_taken_of_named_outputs():
    view = GraphView(two_heads())
    assert output_parts(view, ("main",)) == ["main"]
    assert set(output_parts(view)) == {"main", "auxiliary"}
    config = Config(steps=2, outputs="main")
    report = eptq_onnx.quantize(two_heads(), images(32), config, progress=silent).report
    assert list(report.verification.outputs) == ["main"]
