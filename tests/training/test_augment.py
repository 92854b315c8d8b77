"""Augmented samples change only where they may."""

from __future__ import annotations

import numpy as np
import pytest

from eptq_onnx.training import augment


def test_images_move_sample_by_sample_and_other_inputs_stay():
    rng = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {
        "image": rng.normal(size=(16, 3, 24, 16)).astype(np.float32),
        "last": rng.normal(size=(4, 16, 16, 3)).astype(np.float32),
        "tiny": rng.normal(size=(4, 3, 2, 2)).astype(np.float32),
        "tokens": np.arange(12).reshape(4, 3),
    }
    axes = {"image": 1, "last": 3, "tiny": 1, "tokens": 1}
    moved = augment.moved(feeds, axes, np.random.default_rng(1))
    for name in ("tiny", "tokens"):
        assert moved[name] is feeds[name]
    for name in ("image", "last"):
        assert moved[name].shape == feeds[name].shape
        assert moved[name].dtype == np.float32
        assert not np.array_equal(moved[name], feeds[name])
        # Reflected borders add no new values, and channels are never swapped.
        for n in range(len(feeds[name])):
            assert set(moved[name][n].ravel()) <= set(feeds[name][n].ravel())
    channel = moved["last"][0, :, :, 0]
    assert set(channel.ravel()) <= set(feeds["last"][0, :, :, 0].ravel())
    ramp = {"x": np.broadcast_to(np.arange(16.0, dtype=np.float32), (64, 1, 16, 16)).copy()}
    slopes = {
        float(np.median(np.diff(row[0, 8])))
        for row in augment.moved(ramp, {"x": 1}, np.random.default_rng(2))["x"]
    }
    assert slopes == {1.0, -1.0}


def test_mixtures_are_of_float_samples_only():
    a, b = ({"x": np.full((2, 3), v, np.float32)} for v in (1.0, 3.0))
    mixed = augment.mixed(a, b, np.array([0.25, 1.0], np.float32))["x"]
    np.testing.assert_allclose(mixed, [[2.5] * 3, [1.0] * 3])
    assert mixed.dtype == np.float32
    assert augment.can_mix(a, 2)


@pytest.mark.parametrize("other", [np.zeros((2, 3), np.int64), np.zeros((5, 2), np.float32), np.float32(1)])
def test_what_cannot_be_mixed(other):
    assert not augment.can_mix({"x": np.zeros((2, 3), np.float32), "other": np.asarray(other)}, 2)
