from __future__ import annotations

import numpy as np
import pytest
from graphs import images, small_convnet
from hypothesis import given, settings
from hypothesis import strategies as st

from eptq_onnx import Config
from eptq_onnx.data.layouts import Column
from eptq_onnx.data.samples import Samples
from eptq_onnx.data.splits import ENOUGH, share_out


@settings(deadline=None, max_examples=150)
@given(
    count=st.integers(1, 300),
    batch=st.sampled_from([None, 1, 3, 8]),
    holdout=st.sampled_from([0.02, 0.1, 0.4]),
    seed=st.integers(0, 5),
    sizes=st.integers(1, 3),
)
def test_no_step_sees_what_another_must_not(count, batch, holdout, seed, sizes):
    if batch and count < batch * sizes:
        return
    rng = np.random.default_rng(seed)
    values: list[np.ndarray] = [np.zeros((1 + int(rng.integers(sizes)), 2), np.float32) for _ in range(count)]
    samples = Samples({"x": Column(values, 0)}, batch)
    shares = share_out(samples, Config(holdout=holdout, seed=seed, score_samples=100))
    training, judged, unseen = set(shares.training), set(shares.judged), set(shares.unseen)
    assert training
    assert judged
    assert unseen
    scored = samples.alike()
    assert set(shares.scored) <= set(scored) & (training | judged)
    assert set(shares.scored[shares.held]) <= judged
    assert len(shares.held)
    if shares.held_out:
        assert not training & judged
        assert not (training | judged) & unseen
        assert len(unseen) >= min(8, batch or 8)
    else:
        assert unseen == judged
        assert count < ENOUGH or batch
    if len(training | judged) > (batch or 1):
        assert not training & judged
    for part in (shares.judged, shares.unseen) if sizes == 1 else ():
        assert sum(map(len, samples.batches(part, batch or 1))) == len(part)


def test_the_seed_draws_and_repeats():
    samples = Samples({"x": Column(images(100), 0)}, None)
    first, again, other = (share_out(samples, Config(seed=s)) for s in (0, 0, 1))
    np.testing.assert_array_equal(first.unseen, again.unseen)
    assert not np.array_equal(first.unseen, other.unseen)
    assert (len(first.training), len(first.judged), len(first.unseen)) == (74, 16, 10)


@pytest.mark.parametrize("count", [1, 2, 20, 31, 32, 64])
def test_a_figure_is_called_held_out_only_if_it_is(count):
    import eptq_onnx

    v = eptq_onnx.quantize(small_convnet(), images(count), Config(preset="fast")).report.verification
    assert v.held_out == (count >= ENOUGH)
