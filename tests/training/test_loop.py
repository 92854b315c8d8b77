"""The training graph and the loop: all gradients are right, and no result is worse than the start."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from graphs import images, silent, small_convnet

from eptq_onnx import data, targets
from eptq_onnx.config import Attention, Config, RoundingVariable
from eptq_onnx.data.samples import Selection
from eptq_onnx.engines.base import ACTIVATION_SCALES, ATTENTION, ERRORS, FLOAT_SHARE, LOSS
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.calibrate import calibrate
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.method.qdq import write
from eptq_onnx.method.ranges import weight_ranges
from eptq_onnx.method.score import score
from eptq_onnx.numerics.biases import BiasSpec
from eptq_onnx.numerics.optimizers import Adam
from eptq_onnx.records import Network, Scores
from eptq_onnx.runtime import Session
from eptq_onnx.training.attention import channel_attention, layer_attention, part_weights
from eptq_onnx.training.graph import training_graph
from eptq_onnx.training.loop import Hooks, optimize

TARGET = targets.load("ort-x64")


class Case:
    def __init__(self, engine, model=None, target=TARGET, opset=13, **options):
        self.config = Config(
            **{"weight_bits": 3, "batch_size": 6, "steps": 30, "start": "nearest", "patience": 0, **options}
        )
        self.model = normalize(model or small_convnet(), opset)
        self.plan = plan(self.model, target, self.config)
        self.samples = data.read({"image": images(24)}, self.model)
        self.calibration = calibrate(self.model, self.plan, self.samples, self.config, silent)
        self.indices = np.arange(24)
        self.held = np.sort(np.random.default_rng(0).permutation(24)[:2])
        self.scores = score(
            Network(self.model, self.plan, self.calibration),
            Selection(self.samples, self.indices),
            set(),
            engine,
            self.config,
            silent,
        )
        self.start = weight_ranges(self.model, self.plan, self.calibration, self.scores, self.config)
        self.graph = training_graph(
            Network(self.model, self.plan, self.calibration),
            self.start,
            Selection(self.samples, self.indices),
            self.config,
            engine,
        )

    def feeds(self) -> dict[str, np.ndarray]:
        weights = {
            n: self.start.weights[n].dequantize(self.start.integers[n]) for n in self.plan.weight_specs
        }
        scales = np.array([float(self.start.grids[q].scale) for q in self.graph.quantizers], np.float32)
        attention = (
            np.random.default_rng(0)
            .uniform(0.5, 1, (self.graph.micro_batch, self.graph.columns))
            .astype(np.float32)
        )
        inputs = self.plan.input_scales({n: g.scale for n, g in self.start.grids.items()})
        biases = {}
        for x in self.plan.layers:
            assert x.bias is not None
            grid = inputs[x.node], self.start.weights[x.weight].scale
            biases[x.bias] = BiasSpec().round(self.start.biases[x.bias], *grid)
        return {
            **self.samples.take(np.arange(self.graph.micro_batch)), **weights, **biases,
            ACTIVATION_SCALES: scales, ATTENTION: attention, FLOAT_SHARE: np.array([0.0], np.float32),
        }  # fmt: skip

    def run(self, **options):
        return optimize(
            Network(self.model, self.plan, self.calibration, self.scores),
            self.start,
            self.graph,
            Selection(self.samples, self.indices),
            self.held,
            self.config,
            Hooks(silent),
        )


@pytest.fixture(scope="module")
def case(engine) -> Case:
    return Case(engine)


def _run(session: Session, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return session.run({n: v for n, v in feeds.items() if n in session.inputs})


def test_without_quantization_errors_the_loss_is_zero(engine):
    """With p = 1 and float weights, student and teacher compute the same."""
    case = Case(engine, gradual_activations=True)
    view = GraphView(case.model)
    feeds = {
        **case.feeds(),
        **case.start.biases,
        **{n: view.constant(n) for n in case.plan.weight_specs},
        FLOAT_SHARE: np.array([1.0], np.float32),
    }
    values = _run(Session(case.graph.train), feeds)
    assert float(values[LOSS]) == pytest.approx(0, abs=1e-6)


def test_the_training_graph_evaluates_to_the_same_loss(case):
    feeds = case.feeds()
    train, evaluate = Session(case.graph.train), Session(case.graph.evaluate)
    a, b = _run(train, feeds), _run(evaluate, feeds)
    np.testing.assert_allclose(a[LOSS], b[LOSS], rtol=1e-5)
    np.testing.assert_allclose(a[ERRORS], b[ERRORS], rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_weighted_error_of_the_written_model(case):
    """The training graph's layer errors equal those of the dequantized written model."""
    quantized, _ = write(case.model, case.plan, case.start)
    last = case.plan.layers[-1]
    feeds = case.feeds()
    expected = Session(case.model).run(case.samples.take(np.arange(case.graph.micro_batch)))[last.output]
    got = Session(quantized, optimize=False).run(case.samples.take(np.arange(case.graph.micro_batch)))[
        last.output
    ]
    errors = _run(Session(case.graph.evaluate), feeds)[ERRORS]
    assert case.graph.channels == (8, 8, 8, 5)
    assert case.graph.outputs == {last.output: 5.0}
    np.testing.assert_allclose(errors[:, -6:-1], np.square(expected - got), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(errors[:, -1], np.square(expected - got).sum(axis=1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("operator", ["Conv", "Add", "GlobalAveragePool"])
def test_the_training_graph_converts_activations_of_two_widths_as_the_file_does(engine, operator):
    case = Case(engine, target=targets.load("qnn"), opset=21, bits=[f"op:{operator}=w3a16"])
    assert case.plan.rewritten
    quantized, _ = write(case.model, case.plan, case.start)
    last, feeds = case.plan.layers[-1].output, case.samples.take(np.arange(case.graph.micro_batch))
    expected, got = (Session(m, optimize=False).run(feeds)[last] for m in (case.model, quantized))
    errors = _run(Session(case.graph.evaluate), case.feeds())[ERRORS]
    np.testing.assert_allclose(errors[:, -1], np.square(expected - got).sum(axis=1), rtol=1e-3, atol=1e-5)


def test_gradients_of_the_last_layer_agree_with_finite_differences(case):
    """Behind every quantizer the loss is smooth in the last weight and bias."""
    session = Session(case.graph.train)
    feeds = case.feeds()
    values = _run(session, feeds)
    last = case.plan.layers[-1]
    rng = np.random.default_rng(0)
    for name in (last.weight, last.bias):
        direction = rng.choice([-1.0, 1.0], size=feeds[name].shape).astype(np.float32)
        ends = [
            float(
                _run(session, {**feeds, name: (feeds[name] + s * 1e-2 * direction).astype(np.float32)})[LOSS]
            )
            for s in (1, -1)
        ]
        analytic = float((values[case.graph.gradients[name]] * direction).sum())
        assert analytic == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=2e-2)


def test_scale_gradient_is_the_lsq_rule(each_engine):
    """One quantizer: dL/ds = sum dy * (q - z - mask * x / s)."""
    from onnx import TensorProto, helper
    from op_samples import SAMPLES

    from eptq_onnx.graph import edit
    from eptq_onnx.ops import LSQ_DOMAIN

    sample = SAMPLES[LSQ_DOMAIN, "FakeQuant"][0]
    model = sample.model()
    builder = edit.Builder(model)
    builder.reduce("ReduceSum", builder.add("Mul", ["y0", "v"]), None, "loss")
    model.graph.node.extend(builder.nodes)
    model.graph.input.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, [2, 3, 4]))
    edit.set_outputs(model, ["loss"])
    gradient = each_engine.differentiate(model, "loss", ["x0", "x1"])
    x, s, z = (np.asarray(value) for value in sample.inputs)
    v = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    values = Session(gradient.model).run({"x0": x, "x1": s, "v": v})
    raw = np.rint(x / s) + z
    inside = (raw >= 0) & (raw <= 15)
    levels = np.clip(raw, 0, 15) - z
    np.testing.assert_allclose(values[gradient.gradients["x0"]], v * inside, rtol=1e-6)
    np.testing.assert_allclose(
        values[gradient.gradients["x1"]], [(v * (levels - inside * x / s)).sum()], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("rounding", list(RoundingVariable))
def test_optimization_lowers_the_held_out_error(engine, rounding):
    case = Case(engine, rounding=rounding, steps=80, weight_bits=2)
    best, trace = case.run()
    values = dict(trace.checkpoints)
    assert trace.steps == 80
    assert len(trace.losses) == 80
    assert trace.best_step == 0 or values[trace.best_step] < values[0]
    if rounding is RoundingVariable.STRAIGHT_THROUGH:
        assert values[trace.best_step] < 0.8 * values[0]
        assert trace.flipped > 0
    for name, spec in case.plan.weight_specs.items():
        assert best.integers[name].min() >= spec.qmin
        assert best.integers[name].max() <= spec.qmax
    a1 = best.grids["a1"]
    assert float(np.float32(255) * a1.scale) <= 6.0, "a learned scale must not bring back the absorbed Clip"


@pytest.mark.parametrize("bits", [3, 4])
def test_the_last_layers_get_back_their_slopes(engine, bits):
    case = Case(engine, weight_bits=bits, steps=80)
    best, trace = case.run()
    assert trace.best_step
    last = case.plan.layers[-1]
    quantized, _ = write(case.model, case.plan, best)
    feeds = case.samples.take(case.indices)
    exact, rough = (
        Session(m, optimize=False).run(feeds)[last.output].astype(np.float64) for m in (case.model, quantized)
    )
    np.testing.assert_allclose(rough.mean(axis=0), exact.mean(axis=0), atol=0.02 * exact.std())
    exact, rough = exact - exact.mean(axis=0), rough - rough.mean(axis=0)
    assert (exact * rough).sum() / np.square(exact).sum() == pytest.approx(1, abs=0.02)


def test_slopes_that_cost_more_than_the_loop_brought_are_left(engine, monkeypatch):
    case = Case(engine, weight_bits=2, steps=80)
    found = []

    def spoiled(plan, graph, session, runs, count, rounding):
        found.append(rounding)
        return replace(
            rounding, weights={n: replace(p, scale=3 * p.scale) for n, p in rounding.weights.items()}
        )

    monkeypatch.setattr("eptq_onnx.training.loop._restored", spoiled)
    best, trace = case.run()
    assert trace.best_step
    assert best is found[0]


def test_the_outputs_count_part_by_part_in_units_of_their_spread(engine):
    """If a detector concatenates boxes in pixels and probabilities, both have the same weight."""
    from graphs import normal, parse

    model = parse(
        "g (float[N,3,8,8] image) => (float[N,6,8,8] y) {"
        " a = Conv (image, w)  b = Conv (a, v)  s = Conv (a, u)"
        "  p = Sigmoid (s)  y = Concat <axis = 1> (b, p) }",
        {"w": normal(4, 3, 1, 1), "v": normal(2, 4, 1, 1, scale=100), "u": normal(4, 4, 1, 1)},
    )
    case = Case(engine, model, weight_bits=4)
    assert case.graph.outputs == {"b": 128.0, "p": 256.0}
    quantized, _ = write(case.model, case.plan, case.start)
    feeds = case.samples.take(np.arange(case.graph.micro_batch))
    exact, got = (
        Session(m, optimize=False).run(feeds)["y"].astype(np.float64) for m in (case.model, quantized)
    )
    errors = _run(Session(case.graph.evaluate), case.feeds())[ERRORS][:, -2:]
    parts = [slice(0, 2), slice(2, 6)]
    expected = np.stack([np.square(exact - got)[:, part].sum(axis=(1, 2, 3)) for part in parts], axis=1)
    np.testing.assert_allclose(errors, expected, rtol=2e-2)
    spreads = [
        Session(case.model, optimize=False).run(case.samples.take(case.indices))["y"][:, part].var()
        for part in parts
    ]
    np.testing.assert_allclose(part_weights(case.graph, case.calibration), 1 / np.array(spreads), rtol=1e-2)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_any_share_of_the_outputs_lowers_their_error(engine, share):
    """In the written files, the loop brings the outputs closer to the float network's."""
    case = Case(engine, weight_bits=2, steps=60, output_share=share)
    best, trace = case.run()
    assert trace.checkpoints[0][1] == pytest.approx(1)
    assert trace.best_step
    feeds, last = case.samples.take(case.indices), case.plan.layers[-1].output
    exact = Session(case.model).run(feeds)[last]
    before, after = (
        Session(write(case.model, case.plan, r)[0], optimize=False).run(feeds)[last]
        for r in (case.start, best)
    )
    assert np.square(after - exact).sum() < 0.8 * np.square(before - exact).sum()


def test_a_harmful_optimization_is_not_kept(engine):
    case = Case(engine, rounding_lr=30.0, bias_lr=10.0, steps=10)
    best, trace = case.run()
    assert trace.best_step == 0
    assert best is case.start
    assert len(trace.checkpoints) == 11


def test_an_optimization_that_brings_nothing_ends_early_and_says_so(engine):
    case = Case(engine, rounding_lr=30.0, bias_lr=10.0, steps=20, patience=8)
    best, trace = case.run()
    assert best is case.start
    assert trace.steps == len(trace.losses) < 20
    found = re.fullmatch(
        r"the start was kept: no step lowered the error on held-out samples "
        r"\(best \+[\d.]+ % in (\d+) of 20 steps; stopped as nothing was to be gained\)",
        trace.reason,
    )
    assert found, trace.reason
    assert int(found[1]) == trace.steps


def test_a_step_that_is_kept_is_named(engine):
    case = Case(engine, weight_bits=2, steps=60)
    _, trace = case.run()
    change = dict(trace.checkpoints)[trace.best_step] / trace.checkpoints[0][1] - 1
    assert trace.best_step
    assert trace.reason == (
        f"step {trace.best_step} was kept: it lowered the error on held-out samples "
        f"({100 * change:+.1f} %; {trace.steps} of 60 steps)"
    )


def test_a_model_that_takes_one_sample_at_a_time(engine):
    model = small_convnet()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    single, many = Case(engine, model, steps=6), Case(engine, steps=6)
    assert (single.graph.micro_batch, many.graph.micro_batch) == (1, 4)
    single_losses, losses = (np.mean(case.run()[1].losses) for case in (single, many))
    np.testing.assert_allclose(single_losses, losses, rtol=0.2)


def test_attention_is_relative_to_the_largest_layer(case):
    table = layer_attention(case.plan, case.scores, 24)
    assert table.shape == (4, 24)
    assert table.mean(axis=1).max() == pytest.approx(1)
    np.testing.assert_array_equal(layer_attention(case.plan, None, 24), 1)
    channels = {n: v for n, v in case.scores.channels.items() if n != case.plan.layers[0].output}
    filled = layer_attention(case.plan, Scores(channels, {}, {}, 5), 24)
    np.testing.assert_allclose(filled[0], filled[1:].mean(axis=0), rtol=1e-5)


def test_attention_of_channels_peaks_at_that_of_the_layer(case):
    columns = {
        kind: channel_attention(case.plan, case.scores, case.graph.channels, 24, Config(attention=kind))
        for kind in Attention
    }
    assert all(c.shape == (24, 29) for c in columns.values())
    np.testing.assert_array_equal(columns[Attention.NONE], 1)
    layer, channel = (columns[k][:, :8] for k in (Attention.LAYER, Attention.CHANNEL))
    np.testing.assert_array_equal(layer, layer[:, :1].repeat(8, axis=1))
    np.testing.assert_allclose(channel.max(axis=1), layer[:, 0], rtol=1e-6)
    assert (channel < layer * 0.99).any()


def test_a_layer_behind_an_operator_without_gradient_is_said_not_to_be_optimized(engine):
    """Round passes no gradient: layers that only it reads keep their own loss, and the run continues."""
    from graphs import normal, parse

    import eptq_onnx

    model = parse(
        "g (float[N,3,8,8] image) => (float[N,4,6,6] y) {"
        " a = Conv (image, w)  r = Round (a)  y = Conv (r, v) }",
        {"w": normal(4, 3, 3, 3, scale=2), "v": normal(4, 4, 1, 1)},
    )
    result = eptq_onnx.quantize(model, images(16), Config(steps=4, weight_bits=4, batch_size=4))
    assert result.report.optimization is not None
    (note,) = [n for n in result.report.notes if "no Hessian score" in n]
    assert "has no Hessian score: no output depends on it through operators that have a gradient" in note


@pytest.mark.parametrize(("rounding", "halvings"), [("straight-through", 9), ("soft", 0)])
def test_weights_move_half_as_fast_after_every_check_that_finds_nothing_better(
    engine, rounding, halvings, monkeypatch
):
    case = Case(engine, rounding=rounding, rounding_lr=30.0, bias_lr=10.0, steps=20, patience=0)
    rates = []

    class Watched(Adam):
        def step(self, gradients, rate):
            rates.append(rate)
            super().step(gradients, rate)

    monkeypatch.setattr("eptq_onnx.training.learned.Adam", Watched)
    _, trace = case.run()
    assert trace.best_step == 0
    # Three optimizers take turns, the one of the rounding first; the last step is the second of the ninth
    # check.
    full = 30.0 * 0.5 * (1 + np.cos(np.pi * 19 / 20))
    assert rates[0::3][-1] == pytest.approx(full / 2**halvings)


def test_what_is_masked_with_minus_infinity_is_left_out_of_the_loss(engine):
    """Differences of infinities are not finite."""
    from graphs import normal, parse

    import eptq_onnx

    model = parse(
        "g (float[N,3,8,8] image) => (float[N,4,8,8] y, float[N,4,8,8] z) {"
        "  a = Conv (image, w)  r = Relu (a)  y = Conv (r, v)  z = Where (mask, y, low) }",
        {
            "w": normal(4, 3, 1, 1),
            "v": normal(4, 4, 1, 1),
            "mask": np.arange(8) > 3,
            "low": np.array(-np.inf, np.float32),
        },
    )
    result = eptq_onnx.quantize(model, images(40), Config(steps=4, weight_bits=4, batch_size=4))
    assert result.report.optimization is not None
    assert np.isfinite(result.report.optimization.losses).all()
    assert (
        "NaN or infinite values in the float model count in no statistic: z (50.00%)" in result.report.notes
    )
    assert min(result.report.verification.outputs.values()) > 15
