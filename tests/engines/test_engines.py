from __future__ import annotations

import numpy as np
import pytest
from gradcheck import check_gradients
from graphs import normal, parse, scalar

from eptq_onnx import ConfigError, engines
from eptq_onnx.graph import edit
from eptq_onnx.graph.kernels import faster
from eptq_onnx.runtime import Session


def test_the_best_available_engine_is_chosen_automatically(monkeypatch):
    best, *others = engines.registered().values()
    assert all(other.preference < best.preference for other in others)
    monkeypatch.setattr(best, "available", lambda: True)
    assert engines.choose("auto") is best
    monkeypatch.setattr(best, "available", lambda: False)
    assert engines.choose("auto") is others[0]
    assert engines.choose(best.name) is best, (
        "an unavailable engine can be chosen by name, and reports what is missing"
    )


def test_an_unknown_engine_is_reported():
    with pytest.raises(ConfigError, match="engine 'steam' is unknown: choose one of auto, "):
        engines.make("steam")


def test_gradients_of_initializers_inputs_and_intermediates(each_engine):
    result = each_engine.differentiate(scalar("h = MatMul (x, w)  y = Sigmoid (h)"), "loss", ["w", "x", "h"])
    assert set(result.gradients) == {"w", "x", "h"}
    edit.set_outputs(result.model, list(result.gradients.values()))
    x, w = normal(4, 3, seed=1), normal(3, 2)
    values = Session(result.model).run({"x": x, "w": w})
    s = 1 / (1 + np.exp(-(x @ w)))
    np.testing.assert_allclose(values[result.gradients["h"]], s * (1 - s), rtol=1e-4)
    np.testing.assert_allclose(values[result.gradients["w"]], x.T @ (s * (1 - s)), rtol=1e-4, atol=1e-6)


def test_tensors_that_no_gradient_reaches_are_reported(each_engine):
    result = each_engine.differentiate(
        scalar("h = MatMul (x, w)  r = Round (h)  y = Add (r, r)"), "loss", ["w"]
    )
    assert result.gradients == {}
    assert "operators that have a gradient" in result.unreached["w"]


def test_a_blocked_branch_does_not_stop_the_other(each_engine):
    result = each_engine.differentiate(
        scalar("h = MatMul (x, w)  r = Ceil (h)  y = Add (r, h)"), "loss", ["w"]
    )
    edit.set_outputs(result.model, list(result.gradients.values()))
    x = normal(4, 3, seed=1)
    values = Session(result.model).run({"x": x, "w": normal(3, 2)})
    np.testing.assert_allclose(
        values[result.gradients["w"]], x.sum(axis=0)[:, None].repeat(2, axis=1), rtol=1e-5
    )


def test_an_input_that_a_node_reads_twice(each_engine):
    result = each_engine.differentiate(scalar("y = Mul (x, x)"), "loss", ["x"])
    x = normal(4, 3, seed=1)
    np.testing.assert_allclose(Session(result.model).run({"x": x})[result.gradients["x"]], 2 * x, rtol=1e-6)


def test_quantize_and_dequantize_pass_the_gradient_and_still_round(each_engine):
    model = parse(
        "g (float[4,3] x) => (float loss) { q = QuantizeLinear (x, s, z)  y = DequantizeLinear (q, s, z)"
        "  h = MatMul (y, w)  loss = ReduceSum <keepdims = 0> (h) }",
        {"w": normal(3, 2), "s": np.float32(0.5), "z": np.uint8(9)},
    )
    result = each_engine.differentiate(edit.specialize(model, {"x": (4, 3)}), "loss", ["w", "x"])
    x, w = normal(4, 3, seed=1), normal(3, 2)
    values = Session(result.model).run({"x": x, "w": w})
    rounded = (np.clip(np.rint(x / 0.5) + 9, 0, 255) - 9) * 0.5
    np.testing.assert_allclose(values["loss"], (rounded @ w).sum(), rtol=1e-5)
    edit.add_output(result.model, result.gradients["x"])
    edit.add_output(result.model, result.gradients["w"])
    values = Session(result.model).run({"x": x, "w": w})
    np.testing.assert_allclose(values[result.gradients["x"]], np.tile(w.sum(axis=1), (4, 1)), rtol=1e-5)
    np.testing.assert_allclose(
        values[result.gradients["w"]], np.tile(rounded.sum(axis=0)[:, None], (1, 2)), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("shape", "weight", "attributes"),
    [
        ((2, 3, 6, 5), (4, 3, 3, 3), "pads = [1, 0, 1, 2]"),
        ((2, 4, 7, 7), (4, 1, 3, 2), "group = 4, dilations = [2, 3], pads = [0, 1, 1, 0]"),
        ((2, 4, 6, 6), (6, 2, 3, 3), "group = 2"),
        ((2, 3, 6, 6), (4, 3, 1, 1), "group = 1"),
        ((2, 3, 6, 6), (4, 3, 3, 3), "strides = [2, 2]"),
        ((2, 3, 6, 6), (4, 3, 2, 2), "pads = [2, 2, 2, 2]"),
        ((2, 3, 9), (4, 3, 3), "pads = [1, 1]"),
        ((2, 32, 7, 6), (32, 1, 3, 3), "group = 32, pads = [1, 1, 1, 1]"),
        ((2, 32, 7, 6), (32, 1, 3, 3), "group = 32, pads = [1, 1, 1, 1], strides = [2, 2]"),
        (
            (1, 32, 8, 9),
            (32, 1, 3, 2),
            "group = 32, pads = [0, 1, 2, 0], strides = [3, 2], dilations = [1, 2]",
        ),
        ((2, 32, 9, 9), (32, 1, 2, 2), "group = 32, strides = [3, 3]"),
        ((2, 32, 6, 6), (64, 1, 3, 3), "group = 32, strides = [2, 2]"),
    ],
)
def test_convolutions_of_every_kind_have_exact_gradients(each_engine, shape, weight, attributes):
    def build(x: np.ndarray, w: np.ndarray):
        size = ",".join(map(str, shape))
        body = f"h = Conv <{attributes}> (x, w)  y = Mul (h, h)  loss = ReduceSum <keepdims = 0> (y)"
        text = f"g (float[{size}] x) => (float loss) {{ {body} }}"
        return edit.specialize(parse(text, {"w": w}), {"x": shape})

    x, w = normal(*shape), normal(*weight, seed=1)
    check_gradients(each_engine, build(x, w), {"x": x}, ("x",))
    result = each_engine.differentiate(build(x, w), "loss", ["w"])
    edit.add_output(result.model, result.gradients["w"])
    session = Session(result.model)
    step, rng = 1e-2, np.random.default_rng(0)
    direction = rng.normal(size=w.shape).astype(np.float32)
    ahead, behind = (
        float(session.run({"x": x, "w": w + sign * step * direction})["loss"]) for sign in (1, -1)
    )
    found = session.run({"x": x, "w": w})[result.gradients["w"]]
    assert (ahead - behind) / (2 * step) == pytest.approx(float((found * direction).sum()), rel=1e-3)
    again = Session(faster(result.model)).run({"x": x, "w": w})[result.gradients["w"]]
    np.testing.assert_allclose(again, found, rtol=1e-4, atol=1e-4 * abs(found).max())
