from __future__ import annotations

import numpy as np
import pytest

from eptq_onnx.numerics.optimizers import Adam, MovingAverage, RAdam


@pytest.mark.parametrize("kind", [Adam, RAdam])
def test_a_quadratic_is_minimised(kind):
    parameters = {"a": np.array([3.0, -2.0], np.float32)}
    optimizer = kind(parameters)
    for _ in range(2000):
        optimizer.step({"a": 2 * (parameters["a"] - 1)}, 0.02)
    np.testing.assert_allclose(parameters["a"], 1, atol=1e-2)


def test_the_first_step_of_adam_is_the_rate_whatever_the_scale():
    for scale in (1e-6, 1.0, 1e6):
        parameters = {"a": np.zeros(2, np.float32)}
        Adam(parameters, epsilon=0).step({"a": np.array([scale, -scale], np.float32)}, 0.1)
        np.testing.assert_allclose(parameters["a"], [-0.1, 0.1], rtol=1e-5)


def test_rectified_adam_waits_five_steps():
    parameters = {"a": np.zeros(1, np.float32)}
    optimizer = RAdam(parameters)
    moved = []
    for _ in range(8):
        optimizer.step({"a": np.ones(1, np.float32)}, 0.1)
        moved.append(float(parameters["a"][0]) != 0)
    assert moved == [False] * 5 + [True] * 3


def test_updates_are_in_place_and_only_of_what_has_a_gradient():
    a, b = np.ones(2, np.float32), np.ones(2, np.float32)
    Adam({"a": a, "b": b}).step({"a": np.ones(2, np.float32)}, 0.1)
    assert a[0] < 1
    assert b[0] == 1


def test_a_moving_average_is_the_mean_of_the_first_steps_and_forgets_them_later():
    values = {"x": np.zeros(2, np.float32)}
    average = MovingAverage(values, 4)
    for k in range(1, 5):
        values["x"][:] = k
        average.update()
    np.testing.assert_allclose(average.values["x"], 2.5)
    for _ in range(60):
        average.update()
    np.testing.assert_allclose(average.values["x"], 4, atol=1e-5)
    assert average.values["x"] is not values["x"]
