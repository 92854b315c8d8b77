from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from graphs import images, normal, parse, silent

import eptq_onnx
from eptq_onnx import Config, data, targets
from eptq_onnx.data.samples import Selection
from eptq_onnx.graph import edit
from eptq_onnx.method import equalize as step
from eptq_onnx.method.calibrate import calibrate
from eptq_onnx.method.equalize import equalize
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.method.score import score
from eptq_onnx.numerics import magnitudes
from eptq_onnx.records import Network
from eptq_onnx.runtime import Session

SPREAD = np.geomspace(0.02, 2, 8).astype(np.float32)
"""Magnitude of each channel."""


def uneven(depthwise: bool = True):
    """Return a model with large and small channels, all of which the last layer reads.

    A depthwise layer in the middle reads each channel on its own.
    """
    middle = normal(8, 1, 3, 3, seed=2) if depthwise else normal(8, 8, 3, 3, seed=2, scale=0.2)
    return parse(
        "g (float[N,3,8,8] x) => (float[N,4,6,6] y) {"
        " a = Conv (x, w1, b1)  r = Relu (a)"
        f" c = Conv <group = {8 if depthwise else 1}, pads = [1,1,1,1]> (r, w2)  p = PRelu (c, slope)"
        " y = Conv <pads = [0,0,0,0]> (p, w3) }",
        {
            "w1": normal(8, 3, 3, 3, seed=1, scale=0.2) * SPREAD.reshape(8, 1, 1, 1),
            "b1": normal(8, seed=4, scale=0.2) * SPREAD,
            "w2": middle.astype(np.float32),
            "slope": normal(8, 1, 1, seed=5, scale=0.2),
            "w3": (
                normal(4, 8, 1, 1, seed=3, scale=0.3)
                / (SPREAD if depthwise else np.ones_like(SPREAD)).reshape(1, 8, 1, 1)
            ),
        },
    )


class Case:
    def __init__(self, engine, config: Config, model=None) -> None:
        self.config, self.engine = config, engine
        self.model = normalize(model if model is not None else uneven(), 13)
        self.samples = data.read({"x": images(24)}, self.model)
        self.plan = plan(self.model, targets.load("ort-x64"), config)
        self.scores = self.scored(self.model)

    def scored(self, model):
        calibration = calibrate(model, self.plan, self.samples, self.config, silent)
        weights = self.plan.weight_specs
        return score(
            Network(model, self.plan, calibration),
            Selection(self.samples, np.arange(24)),
            weights,
            self.engine,
            self.config,
            silent,
        )

    def equalized(self, scores="own"):
        given = self.scores if scores == "own" else scores
        return equalize(self.model, self.model, self.plan, self.samples, given, self.config, silent)


@pytest.fixture(scope="module")
def case(engine):
    return Case(engine, Config(batch_size=8, probes=8))


@pytest.mark.parametrize("scores", ["own", None], ids=["with scores", "without"])
def test_the_model_computes_the_same(case, scores):
    model, _, scaled, _ = case.equalized(scores)
    assert {"r", "p"} <= set(scaled)
    assert "x" not in scaled
    assert "y" not in scaled
    feeds = {"x": images(8, seed=3)}
    before, after = Session(case.model).run(feeds)["y"], Session(model).run(feeds)["y"]
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5 * np.abs(before).max())


def test_faint_channels_are_widened(case):
    model, _, _, _ = case.equalized()
    feeds = {"x": images(8, seed=3)}
    probe = [edit.exposing(m, ["r", "p"]) for m in (case.model, model)]
    for tensor in ("r", "p"):
        before, after = (np.abs(Session(m).run(feeds, [tensor])[tensor]).max(axis=(0, 2, 3)) for m in probe)
        assert before.max() / before.min() > 30
        assert after.max() / after.min() < 5, tensor


def test_scores_are_those_of_the_scaled_model(case):
    """With the same random signs, the scores of the new model are the rescaled ones, up to float rounding."""
    model, rescaled, _, _ = case.equalized()
    anew = case.scored(model)
    for name in case.scores.channels:
        np.testing.assert_allclose(
            rescaled.channels[name], anew.channels[name], rtol=1e-3, atol=1e-6 * anew.channels[name].max()
        )
    for name in case.scores.outputs:
        np.testing.assert_allclose(
            rescaled.outputs[name],
            anew.outputs[name],
            rtol=1e-3,
            atol=1e-5 * np.abs(anew.outputs[name]).max(),
        )
    for name in case.scores.weights:
        np.testing.assert_allclose(
            rescaled.weights[name], anew.weights[name], rtol=2e-3, atol=1e-5 * anew.weights[name].max()
        )


def test_weights_with_few_bits_pay_and_are_spared(engine):
    """A dense layer reads the channels: at 2 bits, its steps cost more than rounding 8-bit activations."""
    factors = {}
    for bits in (8, 2):
        case = Case(
            engine, Config(batch_size=8, probes=8, weight_bits=bits, edge_bits=bits), uneven(depthwise=False)
        )
        factors[bits] = case.equalized()[2].get("r", 1.0)
    assert factors[2] < 0.75 * factors[8]


def test_nothing_to_gain_changes_nothing(engine):
    even = parse(
        "g (float[N,3,8,8] x) => (float[N,4,6,6] y) { a = Conv (x, w1)  r = Relu (a)  y = Conv (r, w2) }",
        {
            "w1": np.tile(normal(1, 3, 3, 3, seed=1), (8, 1, 1, 1)),
            "w2": np.tile(normal(4, 1, 1, 1, seed=2), (1, 8, 1, 1)),
        },
    )
    case = Case(engine, Config(batch_size=8, probes=8), even)
    model, scores, scaled, _ = case.equalized()
    assert model is case.model
    assert scores is case.scores
    assert not scaled


def test_slopes_agree_with_differences():
    rng = np.random.default_rng(0)
    tensor = magnitudes.ChannelMagnitudes(np.arange(6), 1)
    for _ in range(3):
        tensor.add(rng.normal(size=(4, 6, 9, 9)) * np.geomspace(0.1, 3, 6).reshape(6, 1, 1), 4)
    activations = step._Activations(tensor.sets, [tensor.side(0), tensor.side(1)], rng.uniform(0.5, 2, 6), 15)
    weights = step._Weights(tensor.sets, rng.normal(size=(5, 6, 9)), tensor.power, rng.uniform(0.5, 2, 5), 7)
    logs, ends = rng.normal(0, 0.3, 6), np.array(activations.widest) - 0.8
    along, along_ends, h = rng.normal(size=6), rng.normal(size=2), 1e-5
    _, slope, ends_slope = activations.error(logs, ends)
    up, down = (activations.error(logs + s * h * along, ends + s * h * along_ends)[0] for s in (1, -1))
    assert (up - down) / (2 * h) == pytest.approx(slope @ along + ends_slope @ along_ends, rel=1e-4)
    _, slope = weights.error(logs)
    up, down = (weights.error(logs + s * h * along)[0] for s in (1, -1))
    assert (up - down) / (2 * h) == pytest.approx(slope @ along, rel=1e-4)


def test_what_is_cut_off_is_measured():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, 60, 60)).astype(np.float32)
    tensor = magnitudes.ChannelMagnitudes(np.arange(3), 1)
    tensor.add(x, 2)
    cut, _ = tensor.side(1).beyond(np.full(3, 1.0))
    exact = np.square(np.maximum(x - 1, 0)).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(cut, exact, rtol=0.05)


@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_integers_serve_the_outputs_better(preset):
    config = Config(preset=preset, steps=0, probes=4)
    results = [
        eptq_onnx.quantize(uneven(), {"x": images(48)}, config.model_copy(update={"equalize": e}))
        for e in (False, True)
    ]
    without, with_ = (r.report.verification.outputs["y"] for r in results)
    assert with_ > without + 6
    assert [set(r.report.equalized) >= {"r", "p"} for r in results] == [False, True]
    assert results[0].report.verification.kernels == results[1].report.verification.kernels


def test_a_tensor_of_unknown_channels_that_shares_a_range_keeps_the_others_as_they_are(case):
    quantizers = tuple(
        replace(q, tensors=(*q.tensors, "elsewhere")) if q.name == "r" else q for q in case.plan.activations
    )
    _, _, scaled, _ = equalize(
        case.model,
        case.model,
        replace(case.plan, activations=quantizers),
        case.samples,
        case.scores,
        case.config,
        silent,
    )
    assert "r" not in scaled
