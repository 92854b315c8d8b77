"""Scores against exact ones, from the full Jacobian of a tiny network."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import normal, parse, silent

import eptq_onnx
from eptq_onnx import data, targets
from eptq_onnx.config import Config
from eptq_onnx.data.samples import Selection
from eptq_onnx.method.calibrate import calibrate
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.method.score import score
from eptq_onnx.records import Network
from eptq_onnx.runtime import Session

TINY = """
<ir_version: 8, opset_import: ["" : 17]>
tiny (float[N,2,4,4] image) => (float[N,3] logits, float[N,4,2,2] features)
{
    c1 = Conv <kernel_shape = [3,3], pads = [1,1,1,1]> (image, w1, b1)
    a1 = Sigmoid (c1)
    features = Conv <kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]> (a1, w2)
    pooled = GlobalAveragePool (features)
    flat = Flatten (pooled)
    logits = Gemm <transB = 1> (flat, w3, b3)
}
"""


def tiny() -> onnx.ModelProto:
    model = onnx.parser.parse_model(TINY)
    rng = np.random.default_rng(0)
    shapes = {"w1": (3, 2, 3, 3), "b1": (3,), "w2": (4, 3, 3, 3), "w3": (3, 4), "b3": (3,)}
    for name, shape in shapes.items():
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(rng.normal(0, 0.5, shape).astype(np.float32), name)
        )
    return model


def _scored(model, the_plan, samples, engine, config):
    """Return the calibration and the scores of the first six samples."""
    calibration = calibrate(model, the_plan, samples, config, silent)
    selection = Selection(samples, np.arange(6))
    network = Network(model, the_plan, calibration)
    return calibration, score(network, selection, the_plan.weight_specs, engine, config, silent)


@pytest.fixture(scope="module")
def case(engine):
    model = normalize(tiny(), 13)
    images = np.random.default_rng(1).normal(size=(6, 2, 4, 4)).astype(np.float32)
    config = Config(weight_bits=4, edge_bits=4, probes=1500, batch_size=4)
    target = targets.load("ort-x64")
    the_plan = plan(model, target, config)
    samples = data.read({"image": images}, model)
    calibration, scores = _scored(model, the_plan, samples, engine, config)
    # Both outputs have the same weight, whatever their sizes.
    mean = (3 + 16) / 2
    spread = {
        o: np.sqrt(calibration.variance[o] * size / mean) for o, size in (("logits", 3), ("features", 16))
    }
    return model, images, the_plan, scores, spread


def _outputs(model: onnx.ModelProto, feeds: dict[str, np.ndarray], spread: dict[str, float]) -> np.ndarray:
    """Return all outputs of one sample as one vector, each divided by its standard deviation."""
    values = Session(model).run(feeds)
    return np.concatenate([(values[o] / spread[o]).reshape(-1) for o in spread]).astype(np.float64)


def test_weight_scores_agree_with_the_exact_jacobian(case):
    """E[(d<v, f>/dw)^2] is the squared norm of df/dw, here by central differences of every output."""
    model, images, _, scores, spread = case
    rng = np.random.default_rng(2)
    for name in ("w1", "w2", "w3"):
        initializer = next(t for t in model.graph.initializer if t.name == name)
        value = onnx.numpy_helper.to_array(initializer)
        for position in rng.choice(value.size, 4, replace=False):
            exact = 0.0
            ends = []
            for sign in (1, -1):
                changed = value.copy()
                changed.reshape(-1)[position] += sign * 1e-2
                twin = onnx.ModelProto()
                twin.CopyFrom(model)
                next(t for t in twin.graph.initializer if t.name == name).CopyFrom(
                    onnx.numpy_helper.from_array(changed, name)
                )
                ends.append(
                    [_outputs(twin, {"image": images[n : n + 1]}, spread) for n in range(len(images))]
                )
            exact = float(np.mean([np.square((a - b) / 2e-2).sum() for a, b in zip(*ends, strict=True)]))
            estimate = float(scores.weights[name].reshape(-1)[position])
            assert estimate == pytest.approx(exact, rel=0.12), name


def test_attention_agrees_with_the_exact_jacobian(case):
    """max over channels of the mean over positions of sum_k (df_k/dz)^2, with z = c1 fed as an input."""
    model, images, the_plan, scores, spread = case
    behind = onnx.ModelProto()
    behind.CopyFrom(model)
    del behind.graph.node[0]
    del behind.graph.input[:]
    behind.graph.input.append(
        onnx.helper.make_tensor_value_info("c1", onnx.TensorProto.FLOAT, ["N", 3, 4, 4])
    )
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.append(onnx.helper.make_tensor_value_info("c1", onnx.TensorProto.FLOAT, None))
    products, positions = np.zeros((3, 3)), []
    for n in range(len(images)):
        z = Session(probe).run({"image": images[n : n + 1]})["c1"]
        power, jacobian = np.zeros(z.shape), np.zeros((3 + 16, *z.shape))
        for place in np.ndindex(*z.shape):
            up, down = z.copy(), z.copy()
            up[place] += 1e-2
            down[place] -= 1e-2
            slope = (_outputs(behind, {"c1": up}, spread) - _outputs(behind, {"c1": down}, spread)) / 2e-2
            power[place] = np.square(slope).sum()
            jacobian[(slice(None), *place)] = slope
        np.testing.assert_allclose(scores.channels["c1"][n], power.mean(axis=(0, 2, 3)), rtol=0.12)
        positions.append(power.sum(axis=(0, 1)).reshape(-1))
        products += np.einsum("knchw,kndhw->cd", jacobian, jacobian) / len(images)
    np.testing.assert_allclose(scores.positions["c1"], np.array(positions) / np.mean(positions), rtol=0.15)
    np.testing.assert_allclose(scores.outputs["c1"], products, atol=0.05 * products.max())
    assert (
        {"c1", "a1", "features", "pooled", "logits"}
        >= set(scores.channels)
        >= {layer.output for layer in the_plan.layers}
    )
    assert scores.channels["c1"].shape == (len(images), 3)
    assert scores.output_size == 3 + 16


def test_positions_are_scored_for_the_small_layers_where_memory_is_short(case, engine):
    model, images, the_plan, scores, _ = case
    assert {n: p.shape for n, p in scores.positions.items()} == {
        "c1": (6, 16),
        "features": (6, 4),
        "logits": (6, 1),
    }
    samples = data.read({"image": images}, model)
    # A sixteenth of the memory is for the tensors of a batch: 180 bytes hold 6 x 1 and 6 x 4 positions, but
    # not another 6 x 16.
    config = Config(probes=1, max_memory=16 * 180)
    less = score(
        Network(model, the_plan, calibrate(model, the_plan, samples, config, silent)),
        Selection(samples, np.arange(6)),
        (),
        engine,
        config,
        silent,
    )
    assert less.positions.keys() == {"features", "logits"}


def test_a_short_last_batch_counts_no_sample_twice(case, engine):
    """Six samples give the same estimate in batches of four and of three."""
    model, images, the_plan, scores, _ = case
    samples = data.read({"image": images}, model)
    config = Config(probes=1500, batch_size=3, seed=5)
    _, other = _scored(model, the_plan, samples, engine, config)
    for name in scores.weights:
        assert float(other.weights[name].mean()) == pytest.approx(float(scores.weights[name].mean()), rel=0.1)


@pytest.mark.parametrize("limit", [1, 40_000])
def test_block_by_block_gives_the_same_scores(case, engine, limit):
    model, images, the_plan, _, _ = case
    samples = data.read({"image": images}, model)
    config = Config(weight_bits=4, edge_bits=4, probes=3, batch_size=4)
    calibration = calibrate(model, the_plan, samples, config, silent)
    calls = []
    whole, parts = (
        score(
            Network(model, the_plan, calibration),
            Selection(samples, np.arange(6)),
            the_plan.weight_specs,
            engine,
            c,
            lambda *a: calls.append(a),
        )
        for c in (config, Config(weight_bits=4, edge_bits=4, probes=3, batch_size=4, max_memory=limit))
    )
    assert calls[-1][0] == calls[-1][1] > 2 * 3
    for name in ("channels", "weights", "outputs"):
        expected, got = getattr(whole, name), getattr(parts, name)
        assert expected.keys() == got.keys()
        for tensor in expected:
            np.testing.assert_allclose(
                got[tensor], expected[tensor], rtol=1e-4, atol=1e-5 * float(np.abs(expected[tensor]).max())
            )
    assert whole.output_size == parts.output_size


def test_products_of_a_single_vector_are_scored():
    body = "h = MatMul (x, w)  r = Relu (h)  y = MatMul (r, v)"
    model = parse(
        f"g (float[4] x) => (float[4] y) {{ {body} }}", {"w": normal(4, 4), "v": normal(4, 4, seed=1)}
    )
    result = eptq_onnx.quantize(model, {"x": normal(40, 4, seed=2)}, Config(steps=2, measure_speed=False))
    assert all(layer.attention is not None for layer in result.report.layers)
