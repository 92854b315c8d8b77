"""NaN and infinite values inside a network: left out of all statistics, named in the report, refused at the
outputs."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import normal, parse
from masked import PARTS, masked, samples

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.errors import DataError
from eptq_onnx.runtime import Session

pytestmark = pytest.mark.once


def sqnr(model, result, feeds) -> float:
    exact, got = (Session(m).run(feeds)["y"].astype(np.float64) for m in (model, result))
    assert np.isfinite(exact).all()
    return float(10 * np.log10(np.square(exact).sum() / np.square(exact - got).sum()))


CONFIGS = {
    "fast": Config(preset="fast"),
    "four steps": Config(steps=4, batch_size=8, probes=1, score_samples=24),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("part", PARTS)
def test_positions_without_numbers_do_not_count(part, config):
    model = masked(part)
    result = eptq_onnx.quantize(model, samples(32, 1), config)
    assert sqnr(model, result.model, samples(48, 2)) > 20
    # What only float operators make and read is not looked at.
    named = any(
        "NaN or infinite values in the float model count in no statistic" in note
        for note in result.report.notes
    )
    assert named == (part != "exponent")
    assert all(np.isfinite(layer.sqnr_db) for layer in result.report.layers)
    if config.preset != "fast":
        assert result.report.optimization is not None, result.report.notes
        assert all(layer.attention for layer in result.report.layers)


@pytest.mark.parametrize(
    "bits", [{"budget": "weights=4"}, {"weight_bits": 4, "activation_bits": 6, "steps": 3, "probes": 1}]
)
def test_other_widths_leave_them_out_as_well(bits):
    model = masked("attention, Where", seed=20)
    result = eptq_onnx.quantize(model, samples(32, 1), Config(**{"preset": "fast", **bits}))
    assert sqnr(model, result.model, samples(48, 2)) > 10


@pytest.mark.parametrize(
    ("body", "value", "what"),
    [
        ("y = Log (h)", -1.0, "NaN"),
        ("y = Log (h)", 0.0, "infinite values"),
        ("z = Relu (h)  y = Reciprocal (z)", -1.0, "infinite values"),
    ],
)
def test_an_output_that_is_no_number_stops_the_run(body, value, what):
    model = parse(
        f"g (float[n,3] x) => (float[n,4] y) {{ h = MatMul (x, w)  {body} }}",
        {"w": np.ones((3, 4), np.float32)},
    )
    x = np.ones((9, 3), np.float32)
    x[6] = value
    with pytest.raises(DataError, match=rf"output 'y' has {what} for calibration sample 6"):
        eptq_onnx.quantize(model, x, Config(preset="fast"))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_output_that_the_model_masks_is_compared_where_it_is_finite(config):
    model = parse(
        "g (float[n,8] x) => (float[n,6] y) { h = MatMul (x, w)  r = Relu (h)  l = MatMul (r, v)  y = Where (mask, low, l) }",
        {
            "w": normal(8, 8),
            "v": normal(8, 6),
            "mask": np.arange(6) > 3,
            "low": np.array(-np.inf, np.float32),
        },
    )
    x = np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32)
    result = eptq_onnx.quantize(model, x, config)
    assert 20 < result.report.verification.outputs["y"] < 100
    y = Session(result.model).run({"x": x})["y"]
    assert np.isneginf(y[:, 4:]).all()
    assert np.isfinite(y[:, :4]).all()
