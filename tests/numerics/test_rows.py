from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eptq_onnx.numerics.rows import laid_beside, rows_axis


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 12), gone=st.integers(0, 3), seed=st.integers(0, 99), axis=st.sampled_from([0, 1])
)
def test_rows_in_another_order_and_number_are_matched_jointly(count, gone, seed, axis):
    rng = np.random.default_rng(seed)
    boxes, scores = rng.normal(size=(count, 4)).astype(np.float32), rng.normal(size=count).astype(np.float32)
    order = rng.permutation(count)[gone:]
    noise = 1e-3 * rng.normal(size=(count, 4)).astype(np.float32)

    def shaped(value: np.ndarray) -> np.ndarray:
        return value[None] if axis else value

    expected = {"boxes": shaped(boxes), "scores": shaped(scores), "other": np.ones(3, np.float32)}
    got = {
        "boxes": shaped((boxes + noise)[order]),
        "scores": shaped(scores[order]),
        "other": np.zeros(3, np.float32),
    }
    pairs = laid_beside(expected, got, {"boxes": axis, "scores": axis})
    lost = sorted(set(range(count)) - set(order.tolist()))
    for name, whole in (("boxes", boxes), ("scores", scores)):
        ours, theirs = (np.squeeze(v, 0) if axis else v for v in pairs[name])
        assert ours.shape == theirs.shape == whole.shape
        error = np.square(ours - theirs).reshape(count, -1).sum(1)
        assert np.count_nonzero(error > 1e-3) <= len(lost)
        np.testing.assert_allclose(error.sum(), np.square(whole[lost]).sum(), atol=1e-3, rtol=1e-2)
    assert np.array_equal(pairs["other"][1], got["other"])


def test_outputs_that_are_equal_stay_in_order():
    value = {"y": np.ones((5, 2), np.float32) * np.arange(5, dtype=np.float32)[:, None]}
    ours, theirs = laid_beside(value, value, {"y": 0})["y"]
    np.testing.assert_array_equal(ours, value["y"])
    np.testing.assert_array_equal(theirs, value["y"])


@pytest.mark.parametrize(
    ("shape", "counts", "axis"), [((1, 7, 4), {7}, 1), ((7, 4), {7}, 0), ((1, 4), {9}, None), ((), {1}, None)]
)
def test_the_axis_of_rows_is_the_one_with_as_many_as_were_chosen(shape, counts, axis):
    assert rows_axis(np.zeros(shape), counts) == axis
