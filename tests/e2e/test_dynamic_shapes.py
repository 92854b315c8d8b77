"""Open dimensions stay open, and samples of different sizes calibrate."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from graphs import images, normal, parse

import eptq_onnx
from eptq_onnx import Config
from eptq_onnx.runtime import Session


def detector() -> onnx.ModelProto:
    """A fully convolutional network whose Resize and Reshape compute their shapes."""
    return parse(
        """
        g (float[N,3,H,W] x) => (float[N,4,H2,W2] y, float[N,L,4] rows) {
            a0 = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w1, b1)
            a = Relu (a0)
            c = Conv <pads = [1,1,1,1]> (a, w2)
            shape = Shape (x)
            image = Slice (shape, two, four)
            head = Slice (shape, zero, one)
            channels = Constant <value_ints = [4]> ()
            sizes = Concat <axis = 0> (head, channels, image)
            u = Resize <mode = "nearest"> (c, , , sizes)
            y = Conv <pads = [1,1,1,1]> (u, w3)
            target = Constant <value_ints = [0,4,-1]> ()
            r = Reshape (y, target)
            rows = Transpose <perm = [0,2,1]> (r)
        }
        """,
        {
            "w1": normal(8, 3, 3, 3), "b1": normal(8, seed=1), "w2": normal(4, 8, 3, 3, seed=2, scale=0.2),
            "w3": normal(4, 4, 3, 3, seed=3, scale=0.3), "zero": np.array([0]), "one": np.array([1]), "two": np.array([2]),
            "four": np.array([4]),
        },
    )  # fmt: skip


SAMPLES = [images(1, size=size, seed=k)[0] for k, size in enumerate(4 * [8, 12, 8, 16, 8, 12, 8, 8, 12, 8])]


@pytest.mark.parametrize("options", [{"preset": "fast"}, {"steps": 3, "batch_size": 2}])
def test_samples_of_different_sizes(options):
    model = detector()
    result = eptq_onnx.quantize(model, {"x": SAMPLES}, Config(**options))
    assert len(result.report.layers) == 3
    told = (
        "gradients need fixed shapes: scored and optimized on the 24 of 40 samples of the most frequent size"
    )
    notes = [n for n in result.report.notes if not n.startswith("nearest rounding stays")]
    assert notes == ([told] if "steps" in options else [])
    dims = [d.dim_param for d in result.model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["N", "", "H", "W"]
    onnx.checker.check_model(result.model, full_check=True)
    for count, size in ((1, 8), (3, 12), (2, 22)):
        x = images(count, size=size, seed=99)
        expected, got = Session(model).run({"x": x}), Session(result.model).run({"x": x})
        for name in ("y", "rows"):
            assert got[name].shape == expected[name].shape
            assert np.square(got[name] - expected[name]).mean() < 0.01 * np.square(expected[name]).mean()


def test_every_sample_of_another_size():
    samples = [images(1, size=size, seed=size)[0] for size in range(8, 14)]
    result = eptq_onnx.quantize(detector(), ({"x": s[None]} for s in samples), Config(steps=2))
    assert result.report.samples == 6
    assert result.report.verification.outputs["y"] > 20


def test_sequences_of_different_lengths():
    model = parse(
        "g (int64[N,L] ids, float[N,L] mask) => (float[N,5] y) { e = Gather (table, ids)  h = MatMul (e, w)  r = Relu (h)"
        " m = Unsqueeze (mask, last)  k = Mul (r, m)  s = ReduceMean <axes = [1], keepdims = 0> (k)  y = Gemm (s, v, b) }",
        {
            "table": normal(20, 6),
            "w": normal(6, 8, seed=1),
            "v": normal(8, 5, seed=2),
            "b": normal(5, seed=3),
            "last": np.array([2]),
        },
    )
    rng = np.random.default_rng(0)
    feeds: list[dict[str, Any]] = [
        {"ids": rng.integers(0, 20, (2, n)), "mask": np.ones((2, n), np.float32)} for n in (5, 9, 5, 7, 5)
    ]
    result = eptq_onnx.quantize(model, feeds, Config(steps=2))
    assert len(result.report.layers) == 2
    for feed in feeds:
        expected, got = Session(model).run(feed)["y"], Session(result.model).run(feed)["y"]
        assert np.square(got - expected).mean() < 0.01 * np.square(expected).mean()
