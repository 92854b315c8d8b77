from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eptq_onnx.numerics import statistics
from eptq_onnx.numerics.statistics import compare

SHAPES = [(7,), (1, 10), (1, 5, 6, 7), (1, 9, 4), (1, 3, 4, 5, 6), (2, 8)]


def _draw(
    shape: tuple[int, ...], count: int, noise: float, seed: int = 0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    random = np.random.default_rng(seed)
    exact = [random.standard_normal(shape).astype(np.float32) for _ in range(count)]
    return exact, [(a + noise * random.standard_normal(shape)).astype(np.float32) for a in exact]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.integers(1, 12),
    st.floats(0.001, 3),
    st.integers(0, 99),
    st.floats(1e-20, 1e20),
)
def test_ratios_are_those_of_the_values(shape, count, noise, seed, unit):
    exact, got = _draw(shape, count, noise, seed)
    exact, got = [a.astype(np.float64) * unit for a in exact], [a.astype(np.float64) * unit for a in got]
    power, error = (
        [np.square(a).sum() for a in exact],
        [np.square(a - b).sum() for a, b in zip(exact, got, strict=True)],
    )
    s = compare(exact, got)
    assert s.samples == count
    assert s.sqnr_db == pytest.approx(10 * np.log10(sum(power) / sum(error)), abs=1e-6)
    assert s.sample_sqnr_db == pytest.approx(10 * np.log10(min(np.divide(power, error))), abs=1e-6)
    assert s.centred_sqnr_db <= s.sqnr_db + 1e-6
    assert (s.mismatched, s.not_finite) == (0, 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_outputs_differ_in_nothing(shape):
    exact, _ = _draw(shape, 5, 0)
    s = compare(exact, exact)
    assert s.sqnr_db == s.centred_sqnr_db == s.channel_sqnr_db == s.sample_sqnr_db == np.inf
    assert s.disagreement == s.expected_disagreement == 0


@pytest.mark.parametrize("mean", [10.0, -1000.0])
@pytest.mark.parametrize("shape", [(1, 6), (1, 6, 8, 8), (1, 50, 6)])
def test_a_large_mean_hides_no_noise(shape, mean):
    """Coordinates of 1000 ± 1 with noise of 1 have a high SQNR and are useless."""
    exact, got = _draw(shape, 64, 1.0)
    s = compare([a + mean for a in exact], [b + mean for b in got])
    assert s.sqnr_db > 15
    assert abs(s.centred_sqnr_db) < 1
    assert abs(s.channel_sqnr_db) < 2.5


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((1, 30, 20, 20), 1), ((1, 20, 20, 30), 3), ((1, 400, 12), 2), ((1, 12, 400), 1), ((1, 4, 5, 6, 7), 1)],
)
def test_channels_are_where_means_differ(shape, axis):
    exact, got = _draw(shape, 4, 0.1)
    size = [1] * len(shape)
    size[axis] = shape[axis]
    offset = 20 * np.random.default_rng(5).standard_normal(size)
    s = compare([a + offset for a in exact], [b + offset for b in got])
    assert s.centred_sqnr_db == pytest.approx(20, abs=1)


@pytest.mark.parametrize("shape", [(1, 8), (1, 8, 5, 4)])
@pytest.mark.parametrize("noise", [0.05, 0.2, 0.6])
def test_the_expected_disagreement_foretells_that_of_other_samples(shape, noise):
    """From 16 samples it predicts the result of 4000, within a factor of two."""
    few = compare(*_draw(shape, 16, noise, seed=1))
    many = compare(*_draw(shape, 4000 // int(np.prod(shape[2:])), noise, seed=2))
    assert many.decisions >= 4000
    assert many.disagreement / 2 < few.expected_disagreement < 2 * many.disagreement + 0.01


@pytest.mark.parametrize("gain", [0.5, 0.9, 3.0])
def test_scores_that_all_grow_decide_as_before(gain):
    exact, _ = _draw((1, 10), 20, 0)
    s = compare(exact, [gain * a for a in exact])
    assert s.decisions == 20
    assert s.disagreement == 0
    assert s.expected_disagreement == pytest.approx(0, abs=1e-6)


def test_scores_that_turn_around_disagree():
    exact, _ = _draw((1, 10), 20, 0)
    s = compare(exact, [-a for a in exact])
    assert s.disagreement == 1
    assert s.expected_disagreement == 1


@pytest.mark.parametrize(
    "exact",
    [[np.ones((1, 1))] * 4, [np.array([[0.0, 5, 1]]) + k for k in range(4)], [np.zeros((1, 7))] * 3,
     [np.zeros((0, 4))] * 3, [np.array(2.0)] * 3, [np.zeros((1, 0, 4))] * 2],
    ids=["one channel", "always the same", "zero", "no rows", "scalar", "no positions"],
)  # fmt: skip
def test_what_decides_nothing_is_no_decision(exact):
    s = compare(exact, [a + 1e-3 for a in exact])
    assert s.decisions == 0
    assert not np.isnan([s.sqnr_db, s.centred_sqnr_db, s.channel_sqnr_db, s.sample_sqnr_db]).any()


def test_another_shape_or_no_number_is_lost():
    exact, got = _draw((1, 4), 4, 0.01)
    bad = [got[0], got[1][:, :3], np.where(got[2] > got[2].min(), got[2], np.nan), np.full((1, 4), np.inf)]
    s = compare(exact, bad)
    assert (s.mismatched, s.not_finite) == (1, 2)
    assert s.sample_sqnr_db == 0
    assert 0 < s.sqnr_db < 10
    assert compare(exact, [b[:, :2] for b in got]).sqnr_db == 0


@pytest.mark.parametrize("masked", [-np.inf, np.inf])
def test_what_is_infinite_in_both_does_not_count(masked):
    exact, got = _draw((1, 6), 8, 0.1)
    hidden = (
        [np.where(np.arange(6) < 2, masked, a) for a in exact],
        [np.where(np.arange(6) < 2, masked, a) for a in got],
    )
    s = compare(*hidden)
    assert s.not_finite == 0
    assert s.sqnr_db == pytest.approx(compare([a[:, 2:] for a in exact], [b[:, 2:] for b in got]).sqnr_db)
    assert compare(exact, hidden[1]).not_finite == 8


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_other_types_and_sizes_that_vary(kind):
    parts = [_draw((1, 5, 3 + k, 4), 1, 0.1, k) for k in range(6)]
    s = compare([a[0].astype(kind) for a, _ in parts], [b[0].astype(kind) for _, b in parts])
    assert s.decisions == sum((3 + k) * 4 for k in range(6))
    assert s.sqnr_db == pytest.approx(20, abs=1)


def test_large_outputs_are_looked_at_in_places(monkeypatch):
    exact, got = _draw((1, 4, 50, 50), 3, 0.1)
    whole = compare(exact, got)
    monkeypatch.setattr(statistics, "_MOST_VALUES", 1000)
    some = compare(exact, got)
    assert (whole.decisions, some.decisions) == (7500, 750)
    assert some.sqnr_db == whole.sqnr_db
    assert some.centred_sqnr_db == pytest.approx(whole.centred_sqnr_db, abs=0.5)


def test_divergence_of_scores():
    exact = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    got = np.array([[1.0, 1.5, 0.0], [0.0, 0.5, 2.5]])
    p, q = (np.exp(v) / np.exp(v).sum(1, keepdims=True) for v in (exact, got))
    wanted = float((p * np.log(p / q)).sum(1).mean())
    logits = compare([row[None] for row in exact], [row[None] for row in got])
    shares = compare([row[None] for row in p], [row[None] for row in q])
    assert logits.divergence == pytest.approx(wanted)
    assert shares.divergence == pytest.approx(wanted), "probabilities are taken as they are"
    certain = compare(
        [np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])], [np.array([[0.9, 0.1]]), np.array([[0.1, 0.9]])]
    )
    assert certain.divergence == pytest.approx(-np.log(0.9))
    assert compare([exact], [exact]).divergence == 0
    assert compare([np.ones((1, 4))], [np.zeros((1, 4))]).divergence == 0, "these are no scores"
