from __future__ import annotations

import numpy as np
import pytest
from graphs import images, small_convnet
from hypothesis import given
from hypothesis import strategies as st

from eptq_onnx.execute.walk import Walk
from eptq_onnx.execute.walkers import Walkers, batches_at
from eptq_onnx.method.normalize import normalize


@given(st.lists(st.integers(0, 100), min_size=1, max_size=40), st.integers(1, 30), st.integers(1, 1000))
def test_no_place_has_more_batches_than_fit(needs: list[int], total: int, limit: int):
    counts = batches_at(needs, total, limit)
    assert all(1 <= n <= total for n in counts)
    assert all(n == 1 or n * need <= limit for n, need in zip(counts, needs, strict=True))
    fixed = batches_at(needs, total, limit, grows=False)
    assert len(set(fixed)) == 1
    assert fixed[0] <= min(counts)


def test_all_batches_walk_where_all_fit():
    assert batches_at([5, 7, 3], 4, 28) == [4, 4, 4]


def test_few_batches_walk_through_large_tensors_and_the_others_join_behind_them():
    assert batches_at([1, 10, 10, 2, 1, 1], 20, 40) == [4, 4, 4, 20, 20, 20]
    # The output of a network may be large, too.
    assert batches_at([10, 1, 1, 1, 1, 1, 1, 1, 1, 1, 10], 20, 40)[-1] == 4


@pytest.mark.parametrize("counts", [[2, 2, 6, 6], [6, 3, 3, 6], [6, 6, 6, 1], [6, 6, 6, 6]])
def test_each_batch_has_its_own_values_wherever_it_joins(counts: list[int]):
    model = normalize(small_convnet(), 13)
    data = {k: images(4, seed=k) for k in range(6)}
    batches = [np.array([k]) for k in data]
    walkers = Walkers((model, model), batches, lambda part: {"image": data[int(part[0])]}, counts)
    expected = Walk(model, [{"image": v} for v in data.values()])
    layers = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm")][: len(counts)]
    for k, layer in enumerate(layers):
        reached, own = walkers.reach(k, layer.input[0], layer.input[0]), expected.reach(layer.input[0])
        assert len(reached.batches) == len(reached.exact) == len(reached.quantized) == counts[k]
        for part, exact, quantized in zip(reached.batches, reached.exact, reached.quantized, strict=True):
            np.testing.assert_allclose(exact, own[int(part[0])], rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(exact, quantized)
