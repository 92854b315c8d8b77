from __future__ import annotations

import numpy as np
import pytest
from graphs import images, normal, parse, silent, small_convnet

import eptq_onnx
from eptq_onnx import Config, targets
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method import rotate as step
from eptq_onnx.method.normalize import normalize
from eptq_onnx.method.plan import plan
from eptq_onnx.method.rotate import rotate
from eptq_onnx.runtime import Session


def bottleneck(kernel: int = 1):
    """Return two inverted residuals joined by a sum, with some weights much larger than others."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_t(2, shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    pads = f"<pads = [{', '.join([str(kernel // 2)] * 4)}]>"
    return parse(
        "g (float[N,3,8,8] x) => (float[N,5,8,8] y) {"
        " c1 = Conv (x, w1, b1)  r1 = Relu (c1)  p1 = Conv (r1, w2, b2)"
        f" c2 = Conv {pads} (p1, w3, b3)  r2 = Relu (c2)  p2 = Conv (r2, w4, b4)  s = Add (p1, p2)"
        f" c3 = Conv {pads} (s, w5, b5)  r3 = Relu (c3)  y = Conv (r3, w6) }}",
        {
            "w1": weight(24, 3, 1, 1), "b1": normal(24), "w2": weight(12, 24, 1, 1), "b2": normal(12),
            "w3": weight(48, 12, kernel, kernel), "b3": normal(48),
            "w4": weight(12, 48, 1, 1), "b4": normal(12),
            "w5": weight(48, 12, kernel, kernel), "b5": normal(48), "w6": weight(5, 48, 1, 1),
        },
    )  # fmt: skip


def rotated(model, **options):
    whole, config = normalize(model, 13), Config(weight_bits=4, **options)
    return whole, *rotate(whole, plan(whole, targets.load("ort-x64"), config), config, silent)


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_model_computes_the_same(kernel):
    whole, model, tensors, notes = rotated(bottleneck(kernel=kernel))
    assert tensors == {"p1": 12, "p2": 12, "s": 12}
    assert not notes
    feeds = {"x": images(8, seed=3)}
    before, after = Session(whole).run(feeds)["y"], Session(model).run(feeds)["y"]
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5 * np.abs(before).max())


def test_rows_are_spread_over_their_ranges():
    whole, model, _, _ = rotated(bottleneck())
    before, after = GraphView(whole), GraphView(model)
    for name in ("w2", "w3", "w4", "w5"):
        peaks = []
        for view in (before, after):
            rows = view.constant(name).reshape(len(view.constant(name)), -1)
            peaks.append(
                float(np.square(np.abs(rows).max(axis=1)).sum() / np.square(rows).mean(axis=1).sum())
            )
        assert peaks[1] < 0.75 * peaks[0]
    for name in ("w1", "w6"):
        np.testing.assert_array_equal(before.constant(name), after.constant(name))


def residual(seed: int):
    """Return three inverted residuals on 32 channels, with weights distributed like trained ones."""
    rng, constants = np.random.default_rng(seed), {}

    def weight(name: str, *shape: int) -> str:
        constants[name] = (rng.laplace(size=shape) / np.sqrt(shape[1])).astype(np.float32)
        return name

    first, second = weight("w0", 96, 8, 1, 1), weight("v0", 32, 96, 1, 1)
    body = f"c0 = Conv (x, {first})  r0 = Relu (c0)  s0 = Conv (r0, {second})"
    for k in (1, 2, 3):
        body += f"  c{k} = Conv (s{k - 1}, {weight(f'w{k}', 96, 32, 1, 1)})  r{k} = Relu (c{k})"
        body += f"  p{k} = Conv (r{k}, {weight(f'v{k}', 32, 96, 1, 1)})  s{k} = Add (s{k - 1}, p{k})"
    body += f"  y = Conv (s3, {weight('wy', 5, 32, 1, 1)})"
    return parse(f"g (float[N,8,4,4] x) => (float[N,5,4,4] y) {{ {body} }}", constants)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_quantized_model_is_nearer_to_the_float_model(seed):
    ratios = []
    for option in (False, True):
        config = Config(preset="fast", weight_bits=4, rotate=option)
        report = eptq_onnx.quantize(residual(seed), images(96, channels=8, size=4), config).report
        assert bool(report.rotated) is option
        ratios.append(report.verification.outputs["y"])
    assert ratios[1] > ratios[0] + 1


def test_nothing_is_mixed_where_it_brings_nothing(monkeypatch):
    monkeypatch.setattr(step, "_WORTH", 0.1)
    whole, model, tensors, _ = rotated(bottleneck())
    assert model is whole
    assert not tensors


def test_too_many_channels_are_told(monkeypatch):
    monkeypatch.setattr(step, "_MOST", 8)
    whole, model, tensors, notes = rotated(bottleneck())
    assert model is whole
    assert not tensors
    assert notes == ["12 channels that could be mixed are left unmixed: the most is 8"]


def test_an_option_turns_it_off():
    whole, model, tensors, _ = rotated(bottleneck(), rotate=False)
    assert model is whole
    assert not tensors


def test_activation_functions_everywhere_leave_nothing_to_mix():
    _, _, tensors, _ = rotated(small_convnet())
    assert not tensors


def test_the_same_seed_gives_the_same_bytes():
    assert rotated(bottleneck())[1].SerializeToString() == rotated(bottleneck())[1].SerializeToString()


def test_slopes_of_the_errors_are_right():
    rng = np.random.default_rng(0)
    beyond = step._norms(normal(6, 4, seed=1))
    producers = [step._Side(15, normal(5, 2 * 7, seed=2), 2), step._Side(0, normal(5, 7, seed=3), 1)]
    consumers = [
        step._Side(15, normal(6 * 3, 5, seed=4), 3, beyond),
        step._Side(127, normal(4, 5, seed=5), 1, np.zeros((4, 1), np.float32)),
    ]
    cost = step._Cost(producers, consumers, rng.random(5), rng.random(5), rng.random(5) + 0.5)
    at = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    _, slope = cost(at.astype(np.float32))
    for place in np.ndindex(5, 5):
        moved = np.zeros((5, 5))
        moved[place] = 1e-2
        ends = [cost((at + sign * moved).astype(np.float32))[0] for sign in (1, -1)]
        assert slope[place] == pytest.approx(
            (ends[0] - ends[1]) / 2e-2, rel=0.05, abs=0.02 * np.abs(slope).max()
        )


def test_the_descent_stays_among_rotations_and_gains():
    producers = [step._Side(15, np.random.default_rng(1).standard_t(2, (8, 40)).astype(np.float32), 1)]
    consumers = [
        step._Side(
            15,
            np.random.default_rng(2).standard_t(2, (40, 8)).astype(np.float32),
            1,
            np.zeros((40, 1), np.float32),
        )
    ]
    cost = step._Cost(producers, consumers, np.ones(8), np.ones(8), np.ones(8))
    start = np.linalg.qr(np.random.default_rng(3).normal(size=(8, 8)))[0]
    rotation, least = step._descended(cost, start)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(8), atol=1e-12)
    assert least == pytest.approx(cost(rotation.astype(np.float32))[0], rel=1e-5)
    assert least < 0.8 * cost(start.astype(np.float32))[0]
