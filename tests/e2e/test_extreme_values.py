"""Values near the ends of float32, dead and constant channels, and tensors without elements: no errors, and
no ruined files."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import normal, parse
from onnx import ModelProto

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.runtime import Session

pytestmark = pytest.mark.once

X = np.random.default_rng(0).standard_normal((24, 3, 16)).astype(np.float32)


def network(first: float = 1, second: float = 1, bias: float = 1, *, dead: bool = False) -> ModelProto:
    """Two convolutions with a sum of both, and a product; the first two have weights of these sizes."""
    w, b = first / 3 * normal(8, 3, 3, seed=1).astype(np.float64), bias * normal(8, seed=2).astype(np.float64)
    v, c = (
        second / 5 * normal(8, 8, 3, seed=3).astype(np.float64),
        max(first * second, 1e-30) * normal(8, seed=4).astype(np.float64),
    )
    if dead:
        for gone in (w[2:4], b[2:4], v[5:6], c[5:6], w[4:5]):
            gone[:] = 0
        b[4] = -100
    values = {"w": w, "b": b, "v": v, "c": c, "f": normal(8, 4, seed=5) / 3}
    return parse(
        "g (float[n,3,16] x) => (float[n,4] y) { a = Conv <pads = [1,1]> (x, w, b)  r = Relu (a)  d = Conv <pads = [1,1]> (r, v, c)"
        "  s = Add (d, r)  m = GlobalAveragePool (s)  e = Flatten (m)  y = MatMul (e, f) }",
        {name: value.astype(np.float32) for name, value in values.items()},
    )


CASES = {
    "large weights": (network(1e20, 1, 1e20), X),
    "small weights": (network(1e-20, 1, 1e-20), X),
    "large, then small": (network(1e20, 1e-20, 1e20), X),
    "small, then large": (network(1e-20, 1e20, 1e-20), X),
    "large inputs": (network(bias=1e20), X * np.float32(1e20)),
    "small inputs": (network(bias=1e-20), X * np.float32(1e-20)),
    "inputs whose sums no float32 holds": (network(bias=1e36), X * np.float32(1e36)),
    "inputs near the largest": (network(0.1, 0.1, 1e36), X * np.float32(5e37)),
    "denormal inputs": (network(), X * np.float32(1e-40)),
    "weights below all": (network(1e-38), X),
    "a bias above all": (network(1e-10, 1, 1e10), X),
    "dead channels": (network(dead=True), X),
    "constant inputs": (network(), np.ones_like(X)),
    "zeros": (network(bias=0), np.zeros_like(X)),
}
CONFIGS = {
    "fast": Config(preset="fast"),
    "low bits": Config(preset="fast", weight_bits=4, activation_bits=6),
    "three steps": Config(steps=3, probes=1, batch_size=8),
    "budget": Config(preset="fast", budget="weights=5"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("model", "x"), CASES.values(), ids=CASES)
def test_the_ends_of_float32_are_no_errors(model, x, config):
    result = eptq_onnx.quantize(model, x, config)
    exact, got = (Session(m).run({"x": x})["y"].astype(np.float64) for m in (model, result.model))
    assert np.square(exact - got).sum() <= 1e-2 * np.square(exact).sum()


@pytest.mark.parametrize("config", [CONFIGS["fast"], CONFIGS["three steps"]], ids=["fast", "three steps"])
def test_samples_that_leave_a_layer_without_rows_are_no_errors(config):
    """No row passes the threshold in some samples, and none in any for the second layer."""
    model = parse(
        "g (float[n,5,6] x) => (float[n,4] y) {"
        "  k = ReduceMax <axes = [2], keepdims = 0> (x)  some = Greater (k, high)  r = Reshape (x, rows)"
        "  f = Reshape (some, flat)"
        "  c = Compress <axis = 0> (r, f)  h = MatMul (c, w)  p = Relu (h)  z = ReduceSum <keepdims = 0> (p, zero)"
        "  m = ReduceMean <axes = [1], keepdims = 0> (x)  a = MatMul (m, v)  y = Add (a, z) }",
        {
            "high": np.array(50, np.float32), "rows": np.array([-1, 6]), "flat": np.array([-1]),
            "w": normal(6, 4), "v": normal(6, 4, seed=1), "zero": np.array([0]),
        },
    )  # fmt: skip
    x = np.random.default_rng(0).standard_normal((16, 5, 6)).astype(np.float32)
    result = eptq_onnx.quantize(model, x, config)
    exact, got = (Session(m).run({"x": x})["y"].astype(np.float64) for m in (model, result.model))
    assert np.square(exact - got).sum() <= 1e-2 * np.square(exact).sum()
