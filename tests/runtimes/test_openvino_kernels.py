"""What OpenVINO computes wrongly on integers stays float, and what it would compute so unasked is shielded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphs import images, normal, parse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eptq_onnx
from eptq_onnx import Config, runtimes
from eptq_onnx.graph.view import GraphView
from eptq_onnx.runtime import Session

CHANNELS = 8
BEFORE = {
    "convolution": "p = Relu (a)",
    "pool": "p = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (a)",
    "joined": "p = Concat <axis = 1> (a, a)",
}


def mean(before, counted=1, pads=(1, 1, 1, 1)):
    """Return a padded mean between convolutions."""
    wide = CHANNELS * (2 if before == "joined" else 1)
    body = (
        f"a = Conv (x, w)  {BEFORE[before]}  m = AveragePool <kernel_shape = [3,3], pads = {list(pads)},"
        f" count_include_pad = {counted}> (p)  y = Conv (m, v)"
    )
    # Values around 3, so that the zero point is far from 0.
    constants = {"w": normal(CHANNELS, 3, 1, 1), "v": normal(4, wide, 1, 1, seed=1)}
    return parse(f"g (float[1,3,8,8] x) => (float[1,4,h,k] y) {{ {body} }}", constants)


def grouped(groups, own, made):
    body = f"a = Conv (x, w)  b = Conv <group = {groups}, pads = [1,1,1,1]> (a, v)  s = Mul (b, m)  y = Conv (s, u)"
    constants = {
        "w": normal(groups * own, 3, 1, 1),
        "v": normal(groups * made, own, 3, 3, seed=1),
        "m": np.abs(normal(1, groups * made, 1, 1, seed=2)),
        "u": normal(4, groups * made, 1, 1, seed=3),
    }
    return parse(f"g (float[1,3,8,8] x) => (float[1,4,h,k] y) {{ {body} }}", constants)


def quantized(model):
    options: dict[str, Any] = {"preset": "fast", "target": "openvino", "measure_speed": False, "max_noise": 0}
    return eptq_onnx.quantize(model, shifted(16), Config(**options))


def shifted(count, seed=0):
    return {"x": images(count, seed=seed) + 3}


def reasons(result):
    return {x.op_type: x.reason for x in result.report.kept_float}


@pytest.mark.parametrize("before", BEFORE)
def test_a_mean_that_counts_pads_stays_float_behind_a_shield(before):
    result = quantized(mean(before))
    view = GraphView(result.model)
    [node] = [n for n in view.nodes if n.op_type == "AveragePool"]
    maker = view.producer[node.input[0]]
    if maker.op_type == "LeakyRelu":
        assert view.producer[maker.input[0]].op_type == "DequantizeLinear"
    else:
        assert maker.op_type != "DequantizeLinear"
    assert "pads that count in the mean is 4" in reasons(result)["AveragePool"]


def test_other_means_are_quantized():
    for model in (mean("convolution", counted=0), mean("convolution", pads=(0, 0, 0, 0))):
        assert "AveragePool" not in reasons(quantized(model))


@pytest.mark.parametrize(("groups", "own", "made", "on_integers"), [
    (1, 6, 6, True), (8, 1, 1, True), (2, 4, 8, True), (4, 2, 1, False), (2, 6, 6, False), (4, 1, 2, False),
])  # fmt: skip
def test_groups_without_channels_in_fours_stay_float(groups, own, made, on_integers):
    result = quantized(grouped(groups, own, made))
    assert ("Conv" not in reasons(result)) == on_integers


def agreement(model, precision):
    """Return the SQNR of what OpenVINO computes of a quantized file against onnxruntime, in dB."""
    result, feeds = quantized(model), shifted(1, seed=9)
    [exact] = Session(result.model, integers=False).run(feeds).values()
    with runtimes.make(precision).load(result.model, 1) as loaded:
        [got] = loaded.run(feeds).values()
    return 10 * np.log10(np.square(exact).sum() / max(np.square(exact - got).sum(), 1e-30))


@pytest.mark.parametrize("precision", ["openvino", "openvino-f32"])
@settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_openvino_computes_what_the_file_says(precision, data):
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    pads = data.draw(st.tuples(*[st.integers(0, 1)] * 4))
    models = (
        mean(data.draw(st.sampled_from(list(BEFORE))), data.draw(st.integers(0, 1)), pads),
        grouped(
            *data.draw(st.sampled_from([(4, 2, 1), (2, 6, 6), (4, 1, 2), (8, 1, 1), (2, 4, 8), (3, 3, 5)]))
        ),
    )
    # Roundings differ by a step here and there; what is wrong has less than 10 dB.
    assert min(agreement(model, precision) for model in models) > 25
