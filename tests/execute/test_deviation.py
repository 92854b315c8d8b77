from __future__ import annotations

import numpy as np
import pytest
from graphs import images, normal, parse, small_convnet

from eptq_onnx import Config, data
from eptq_onnx.execute.deviation import LOST, Deviation, mean_noise, noise
from eptq_onnx.graph import edit
from eptq_onnx.method.normalize import normalize
from eptq_onnx.runtime import Session


def test_output_parts_have_equal_weight_and_a_part_of_another_size_is_lost():
    exact = [[np.zeros((2, 3), np.float32), np.ones((2, 100), np.float32)]]
    got = [[np.ones((2, 3), np.float32), np.ones((2, 100), np.float32)]]
    np.testing.assert_allclose(noise(exact, got, [4.0, 1.0]), [[0.25, 0]])
    assert mean_noise(noise(exact, got, [4.0, 1.0])) == pytest.approx(0.125)
    np.testing.assert_allclose(
        noise(exact, [[got[0][0], np.ones((2, 7), np.float32)]], [4.0, 1.0]), [[0.25, 1]]
    )
    np.testing.assert_array_equal(
        noise(exact, [[np.full((2, 3), np.nan, np.float32), got[0][1]]], [4.0, 1.0]), [[LOST, 0]]
    )


def test_runs_are_weighted_by_their_number_of_elements():
    exact = [[np.zeros((1, 4), np.float32)], [np.zeros((3, 4), np.float32)]]
    got = [[np.full((1, 4), 2, np.float32)], [np.ones((3, 4), np.float32)]]
    ratios = noise(exact, got, [1.0])
    np.testing.assert_allclose(ratios, [[2.0], [1.5]])
    assert ratios.mean() == pytest.approx(np.mean([4.0] * 4 + [1.0] * 12))


@pytest.mark.parametrize("memory", [None, 100_000], ids=["at once", "block by block"])
def test_deviation_is_the_squared_difference_in_units_of_the_variance(memory):
    model = normalize(small_convnet(), 13)
    samples = data.read({"image": images(24)}, model)
    other = edit.with_constants(model, {"b4": normal(5, seed=8)})
    deviation = Deviation(model, samples, np.arange(24), 24, {"logits": 4.0}, Config(max_memory=memory))
    before, after = (Session(m).run(samples.take(range(24)))["logits"] for m in (model, other))
    assert deviation.parts == ["logits"]
    assert deviation(model) == 0
    assert deviation(other) == pytest.approx(np.square(after - before).mean() / 4, rel=1e-4)


def test_tensors_may_have_other_names():
    model = parse("g (float[N,3] x) => (float[N,2] y) { y = MatMul (x, w) }", {"w": normal(3, 2)})
    other = parse("g (float[N,3] x) => (float[N,2] z) { z = MatMul (x, w) }", {"w": 2 * normal(3, 2)})
    samples = data.read({"x": normal(8, 3, seed=1)}, model)
    deviation = Deviation(model, samples, np.arange(8), 8, {"y": 1.0}, Config())
    y = Session(model).run(samples.take(range(8)))["y"]
    assert deviation(other, {"y": "z"}) == pytest.approx(np.square(y).mean(), rel=1e-5)


def test_outputs_without_variance_are_ignored():
    model = parse("g (float[N,3] x) => (float[N,2] y) { y = MatMul (x, w) }", {"w": normal(3, 2)})
    samples = data.read({"x": normal(8, 3, seed=1)}, model)
    assert not Deviation(model, samples, np.arange(8), 8, {"y": 0.0}, Config()).parts
