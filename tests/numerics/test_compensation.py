"""Compensated rounding: exact where an exact answer is known, and better than rounding to nearest."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eptq_onnx.numerics import compensation
from eptq_onnx.numerics.formats import FloatFormat, IntFormat
from eptq_onnx.numerics.gains import Comparison
from eptq_onnx.numerics.grid import Levels
from eptq_onnx.numerics.linear import MatrixForm
from eptq_onnx.numerics.moments import Moments, OutputNonlinearity, drawn_places, sampled_moments

LEVELS = Levels(IntFormat(3, True, -4, 3), np.zeros((1, 1), np.float32))


def _inputs(rows: int, terms: int, groups: int = 1, seed: int = 0) -> np.ndarray:
    """Correlated inputs, of shape (groups, rows, terms)."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(groups, rows, terms)) @ rng.normal(size=(groups, terms, terms)) + 1).astype(
        np.float32
    )


def _moments(
    exact: np.ndarray, quantized: np.ndarray, parts: int = 3, weight: np.ndarray | None = None
) -> Moments:
    """Return the moments of these rows; by default, the outputs are the inputs."""
    terms = exact.shape[2]
    moments = Moments(np.stack([np.eye(terms, dtype=np.float32)] * len(exact)) if weight is None else weight)
    for f, q in zip(
        np.array_split(exact, parts, axis=1), np.array_split(quantized, parts, axis=1), strict=True
    ):
        moments.add(f, q)
    return moments


def test_moments_are_those_of_all_rows_at_once():
    exact, quantized = _inputs(200, 5, 2), _inputs(200, 5, 2, seed=1)
    weight = np.random.default_rng(2).normal(size=(2, 3, 5)).astype(np.float32)
    moments = _moments(exact, quantized, weight=weight)
    a, c, v = moments.covariances
    for g in range(2):
        outputs = exact[g] @ weight[g].T
        y, q = outputs - outputs.mean(axis=0), quantized[g] - quantized[g].mean(axis=0)
        np.testing.assert_allclose(a[g], q.T @ q / 200, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(c[g], q.T @ y / 200, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(v[g], np.square(y).mean(axis=0), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(moments.means[0][g], outputs.mean(axis=0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(moments.means[1][g], quantized[g].mean(axis=0), rtol=1e-4)


def test_rows_count_as_often_as_their_weights_say():
    exact, quantized = _inputs(30, 4, 2), _inputs(30, 4, 2, seed=1)
    times = np.arange(30) % 3
    weighed, repeated = (Moments(np.ones((2, 3, 4), np.float32)) for _ in range(2))
    weighed.add(exact, quantized, times.astype(np.float32))
    repeated.add(exact.repeat(times, axis=1), quantized.repeat(times, axis=1))
    for got, expected in zip(
        (*weighed.covariances, *weighed.means), (*repeated.covariances, *repeated.means), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


def _relu(z: np.ndarray) -> np.ndarray:
    return np.maximum(z, 0)


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_count_for_each_output_by_the_slope_of_what_reads_it(groups):
    exact, quantized = _inputs(60, 4, groups), _inputs(60, 4, groups, seed=1)
    weight = np.random.default_rng(2).normal(size=(groups, 3, 4)).astype(np.float32)
    outputs = exact @ weight.swapaxes(1, 2)
    bias = -np.median(outputs, axis=1)
    apart = Moments(weight, nonlinearity=OutputNonlinearity(_relu, bias))
    apart.add(exact, quantized)
    assert apart.apart == 3
    steps = 0.25 * outputs.std(axis=1, keepdims=True)
    for g, k in product(range(groups), range(3)):
        z, h = outputs[g, :, k] + bias[g, k], steps[g, 0, k]
        slope = (_relu(z + h) - _relu(z - h)) / (2 * h)
        seen = 0.05 + 0.95 * slope**2
        alone = Moments(weight[g : g + 1, k : k + 1])
        alone.add(exact[g : g + 1], quantized[g : g + 1], seen.astype(np.float32))
        for got, expected in zip(
            (*apart.covariances, *apart.means), (*alone.covariances, *alone.means), strict=True
        ):
            np.testing.assert_allclose(got[3 * g + k], expected[0], rtol=1e-3, atol=1e-3)


def test_a_function_of_slope_one_sees_all_rows_alike():
    exact, weight = _inputs(60, 4), np.random.default_rng(2).normal(size=(1, 3, 4)).astype(np.float32)
    plain, read = (
        Moments(weight),
        Moments(weight, nonlinearity=OutputNonlinearity(lambda z: z + 1, np.zeros((1, 3), np.float32))),
    )
    for moments in (plain, read):
        for part in np.array_split(exact, 3, axis=1):
            moments.add(part, part)
    for got, expected in zip(read.halves[0], plain.halves[0], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    for k in range(3):
        np.testing.assert_allclose(read.covariances[0][k], plain.covariances[0][0], rtol=1e-3, atol=1e-3)


def test_where_a_function_has_no_value_nothing_is_seen():
    reader = OutputNonlinearity(lambda z: np.where(z > 0, z, np.nan), np.zeros((1, 1), np.float32))
    inputs, weight = np.array([[[-3], [3]]], np.float32), np.array([[[1]]], np.float32)
    np.testing.assert_array_equal(reader.slopes(inputs, weight), [[[0], [1]]])


def test_important_positions_are_drawn_more_often_and_count_what_they_should():
    form = MatrixForm()
    batches = [_inputs(4000, 3, seed=k)[0] for k in range(4)]
    importance = [np.linspace(0, 2, 4000).astype(np.float32) ** 4 for _ in batches]
    drawn = sampled_moments(
        form,
        Moments(np.eye(3, dtype=np.float32)[None]),
        (batches, batches),
        3000,
        np.random.default_rng(0),
        importance,
    )
    whole = Moments(np.eye(3, dtype=np.float32)[None])
    for rows, counts in zip(batches, importance, strict=True):
        whole.add(rows[None], rows[None], counts)
    np.testing.assert_allclose(
        drawn.covariances[0], whole.covariances[0], atol=0.05 * whole.covariances[0].max()
    )


def test_the_target_undoes_a_linear_error_upstream():
    exact = _inputs(500, 4)
    mixing = np.eye(4, dtype=np.float32) + 0.2 * np.random.default_rng(3).normal(size=(4, 4)).astype(
        np.float32
    )
    weight = np.random.default_rng(4).normal(size=(1, 3, 4)).astype(np.float32)
    moments = _moments(exact, exact @ mixing, weight=weight)
    target = compensation.corrected_target(weight, *moments.covariances, damping=1e-9)
    np.testing.assert_allclose(target[0], weight[0] @ np.linalg.inv(mixing).T, rtol=1e-2, atol=1e-3)


def test_noise_in_the_inputs_does_not_shrink_the_outputs():
    rng = np.random.default_rng(1)
    exact = rng.normal(size=(1, 4000, 4)).astype(np.float32)
    noisy = exact + rng.normal(0, 0.25, size=exact.shape).astype(np.float32)
    weight = np.array([[[1, -2, 0.5, 1], [0, 1, 3, -1]]], np.float32)
    target = compensation.corrected_target(
        weight, *_moments(exact, noisy, weight=weight).covariances, damping=1e-9
    )
    for channel in range(2):
        wanted = exact[0] @ weight[0, channel]
        least_squares = np.linalg.lstsq(noisy[0], wanted)[0]
        assert np.polyfit(wanted, noisy[0] @ least_squares, 1)[0] < 0.95
        assert np.polyfit(wanted, noisy[0] @ target[0, channel], 1)[0] == pytest.approx(1, abs=0.01)


def test_without_correlations_it_is_rounding_to_nearest():
    target = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    scale = np.full((2, 5), 0.3, np.float32)
    moment = np.stack([np.diag(np.arange(1.0, 7.0))] * 2)
    expected = np.clip(np.rint(target / 0.3), -4, 3)
    np.testing.assert_array_equal(
        compensation.compensated_rounding(target, scale, compensation.Feedback.of(moment), LEVELS), expected
    )
    np.testing.assert_array_equal(
        compensation.coordinate_descent(target, expected, scale, moment, LEVELS, 3), expected
    )


@pytest.mark.parametrize("terms", [4, 150])
def test_compensation_and_descent_lower_the_cost(terms):
    inputs = _inputs(4 * terms, terms)
    a, _, _ = _moments(inputs, inputs).covariances
    a = compensation.damped(a, 0.01)
    target = np.random.default_rng(1).normal(size=(1, 8, terms)).astype(np.float32)
    scale = np.full((1, 8), 0.6, np.float32)

    def cost(q: np.ndarray) -> np.ndarray:
        return compensation.cost(q * scale[:, :, None] - target, a)

    nearest = np.clip(np.rint(target / scale[:, :, None]), -4, 3)
    rounded = compensation.compensated_rounding(target, scale, compensation.Feedback.of(a), LEVELS)
    descended = compensation.coordinate_descent(target, rounded, scale, a, LEVELS, 3)
    assert cost(rounded).sum() < 0.7 * cost(nearest).sum()
    assert (cost(descended) <= cost(rounded) * (1 + 1e-4)).all()
    np.testing.assert_array_equal(descended, np.clip(np.rint(descended), -4, 3))


def test_unequal_steps_are_rounded_and_descended_like_equal_ones():
    inputs = _inputs(800, 40)
    a = compensation.damped(_moments(inputs, inputs).covariances[0], 0.01)
    rng = np.random.default_rng(1)
    target = rng.normal(size=(1, 8, 40)).astype(np.float32)
    scale = np.full((1, 8), 0.5, np.float32)
    form = FloatFormat(3, 1, finite=True)
    levels = Levels(form, np.zeros((1, 8), np.float32))

    def cost(q: np.ndarray) -> float:
        return float(compensation.cost(q * scale[:, :, None] - target, a).sum())

    nearest = levels.nearest(target / scale[:, :, None])
    rounded = compensation.compensated_rounding(target, scale, compensation.Feedback.of(a), levels)
    descended = compensation.coordinate_descent(target, rounded, scale, a, levels, 3)
    assert cost(descended) <= cost(rounded) < 0.7 * cost(nearest)
    g = _output_moments(1, 8, rng)
    joint = compensation.joint_descent(target, descended, scale, a, g, levels, 3)

    def effect(q: np.ndarray) -> float:
        error = (q * scale[:, :, None] - target)[0]
        return float(np.einsum("ij,jt,ts,is->", g[0], error, a[0], error))

    assert effect(joint) < effect(descended)
    for values in (nearest, rounded, descended, joint):
        np.testing.assert_array_equal(form.at(form.position(values)), values)
        assert len(np.unique(np.diff(np.unique(values)))) > 1


def test_descent_finds_the_best_of_all_integers_when_started_everywhere():
    inputs = _inputs(50, 3)
    a = compensation.damped(_moments(inputs, inputs).covariances[0], 0.01)
    target = np.random.default_rng(5).normal(size=(1, 1, 3)).astype(np.float32)
    scale = np.full((1, 1), 0.5, np.float32)
    every = np.array(list(product(range(-4, 4), repeat=3)), np.float32)
    costs = [float(compensation.cost(q[None, None] * 0.5 - target, a)[0, 0]) for q in every]
    ends = [
        compensation.coordinate_descent(target, q[None, None].copy(), scale, a, LEVELS, 20) for q in every
    ]
    assert min(float(compensation.cost(q * 0.5 - target, a)[0, 0]) for q in ends) == pytest.approx(min(costs))


def test_inputs_that_never_vary_do_no_harm():
    constant = np.ones((1, 20, 4), np.float32)
    weight = np.random.default_rng(0).normal(size=(1, 2, 4)).astype(np.float32)
    a, c, v = _moments(constant, constant, weight=weight).covariances
    target = compensation.corrected_target(weight, a, c, v, 0.5)
    np.testing.assert_allclose(target, weight, rtol=1e-5)
    q = compensation.compensated_rounding(
        target,
        np.full((1, 2), 0.5, np.float32),
        compensation.Feedback.of(compensation.damped(a, 0.03)),
        LEVELS,
    )
    assert np.isfinite(q).all()


def _output_moments(groups: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """Return G of outputs that the rest of the network adds up in three ways.

    The shape is (groups, channels, channels).
    """
    mixing = rng.normal(size=(groups, channels, 3))
    return mixing @ mixing.swapaxes(1, 2) + 0.1 * np.eye(channels)


@pytest.mark.parametrize("groups", [1, 3])
def test_joint_descent_lowers_the_effect_on_the_outputs_and_is_coordinate_descent_without_one(groups):
    inputs = _inputs(400, 80, groups)
    a = compensation.damped(_moments(inputs, inputs).covariances[0], 0.01)
    rng = np.random.default_rng(1)
    target, scale = rng.normal(size=(groups, 8, 80)).astype(np.float32), np.full((groups, 8), 0.6, np.float32)
    g = _output_moments(groups, 8, rng)
    levels = Levels(IntFormat(3, True, -4, 3), np.zeros_like(scale))
    start = compensation.compensated_rounding(target, scale, compensation.Feedback.of(a), levels)

    def effect(q: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        error = q * 0.6 - target
        return np.einsum("gij,gjt,gts,gis->g", outputs, error, a, error, optimize=True)

    plain = np.stack([np.eye(8)] * groups)
    alone = compensation.coordinate_descent(target, start, scale, a, levels, 9)
    joint = compensation.joint_descent(target, start, scale, a, g, levels, 9)
    assert (effect(joint, g) < 0.9 * effect(alone, g)).all()
    np.testing.assert_array_equal(joint, np.clip(np.rint(joint), -4, 3))
    same = compensation.joint_descent(target, start, scale, a, plain, levels, 9)
    np.testing.assert_allclose(effect(same, plain), effect(alone, plain), rtol=1e-3)


def test_refitted_scales_lower_the_cost_and_leave_empty_rows_alone():
    inputs = _inputs(400, 12, 2)
    a = compensation.damped(_moments(inputs, inputs).covariances[0], 0.01)
    rng = np.random.default_rng(2)
    target, scale = rng.normal(size=(2, 3, 12)).astype(np.float32), np.full(3, 0.5, np.float32)
    owners = np.array([[0, 1, 2], [0, 1, 2]])
    integers = np.rint(target / 0.7)
    integers[:, 2] = 0

    def cost(scales: np.ndarray) -> np.ndarray:
        return compensation.cost(integers * scales[owners][:, :, None] - target, a).sum(axis=0)

    fitted = compensation.refitted_scale(target, integers, scale, a, owners)
    assert fitted[2] == scale[2]
    assert (cost(fitted)[:2] < cost(scale)[:2]).all()
    for factor in (0.99, 1.01):
        assert (cost(fitted)[:2] < cost(fitted * np.float32(factor))[:2]).all()


@pytest.mark.parametrize(
    "owners", [np.arange(12).reshape(2, 6), np.stack([np.arange(6)] * 2), np.zeros((2, 6), np.int64)],
    ids=["per channel", "shared by groups", "per tensor"],
)  # fmt: skip
def test_jointly_refitted_scales_lower_the_effect_on_the_outputs(owners):
    inputs = _inputs(400, 12, 2)
    a = compensation.damped(_moments(inputs, inputs).covariances[0], 0.01)
    rng = np.random.default_rng(2)
    target = rng.normal(size=(2, 6, 12)).astype(np.float32)
    g = _output_moments(2, 6, rng)
    scale = np.full(owners.max() + 1, 0.5, np.float32)
    integers = np.rint(target / 0.6).astype(np.float32)

    def effect(scales: np.ndarray) -> float:
        error = integers * scales[owners][:, :, None] - target
        return float(np.einsum("gij,gjt,gts,gis->", g, error, a, error, optimize=True))

    fitted = compensation.jointly_refitted_scale(target, integers, scale, a, g, owners)
    assert effect(fitted) < effect(scale)
    assert effect(fitted) == pytest.approx(
        min(effect(fitted * np.float32(f)) for f in (0.98, 0.99, 1, 1.01, 1.02)), rel=1e-3
    )


def test_the_damping_is_what_serves_inputs_that_were_not_fitted():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(2, 3, 30)).astype(np.float32)
    mixing = np.eye(30, dtype=np.float32) + 0.1 * rng.normal(size=(30, 30)).astype(np.float32)
    many = rng.normal(size=(2, 20_000, 30)).astype(np.float32)
    few = many[:, :80]
    noise = rng.normal(0, 0.1, size=few.shape).astype(np.float32)
    correctable = compensation.best_damping(weight, _moments(many, many @ mixing, 4, weight).halves)
    chance = compensation.best_damping(weight, _moments(few, few + noise, 4, weight).halves)
    assert correctable.shape == (2,)
    assert (correctable < chance).all()
    assert set(correctable) | set(chance) <= set(compensation.DAMPINGS)
    assert _moments(few, few, 1).halves == ()
    np.testing.assert_array_equal(compensation.best_damping(weight, ()), compensation.DAMPINGS[3])


def _compared(slopes: np.ndarray, noise: float, count: int = 60, seed: int = 0) -> Comparison:
    rng = np.random.default_rng(seed)
    exact = 3 + rng.normal(size=(count, 10, len(slopes)))
    return Comparison.of(exact, slopes * exact + noise * rng.normal(size=exact.shape))


def test_slopes_that_differ_by_chance_are_one_slope():
    noisy = _compared(np.full(50, 0.95), 0.5)
    np.testing.assert_allclose(noisy.gains, 1 / 0.95, atol=0.015)
    single = (
        noisy.product.sum(axis=0)
        - noisy.exact.sum(axis=0) * noisy.quantized.sum(axis=0) / noisy.positions.sum()
    )
    power = noisy.power.sum(axis=0) - noisy.exact.sum(axis=0) ** 2 / noisy.positions.sum()
    assert (single / power).std() > 3 * (1 / noisy.gains).std(), "one by one, they are mostly noise"


def test_slopes_that_differ_keep_apart():
    slopes = np.tile([0.93, 1.0, 1.04], 5)
    np.testing.assert_allclose(_compared(slopes, 0.02).gains, 1 / slopes, atol=2e-3)
    np.testing.assert_allclose(_compared(np.array([0.2, 3.0]), 0.0).gains, [1.1, 1 / 1.1], rtol=1e-6)


def test_slopes_of_batches_are_those_of_their_samples():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(9, 4, 6)).astype(np.float32)
    quantized = 0.95 * exact + 0.1 * rng.normal(size=exact.shape).astype(np.float32)
    whole = Comparison.of(exact[:7], quantized[:7])
    parts = [Comparison.of(exact[a : a + 3], quantized[a : a + 3]) for a in (0, 3, 6)]
    joined = Comparison.joined(parts, 7 / 9)
    np.testing.assert_allclose(joined.gains, whole.gains)
    np.testing.assert_allclose(joined.means[0], exact[:7].mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(joined.means[1], quantized[:7].mean(axis=(0, 1)), rtol=1e-5)


def test_what_never_varies_has_no_slope():
    still = Comparison.of(np.ones((5, 4, 3)), np.zeros((5, 4, 3)))
    np.testing.assert_array_equal(still.gains, 1)
    exact = np.random.default_rng(0).normal(size=(5, 4, 3)) * [1, 0, 1]
    some = Comparison.of(exact, 0.95 * exact)
    np.testing.assert_allclose(some.gains, 1 / 0.95)
    lone = Comparison.of(exact[:1], exact[:1] * [0.92, 1, 1])
    assert len(set(lone.gains.tolist())) == 1, "one sample cannot tell channels apart"


@pytest.mark.parametrize("spread", [0, 10, 20, 30, 60])
@pytest.mark.parametrize("dead", [False, True])
def test_moments_beyond_the_precision_of_float64_are_no_errors(spread, dead):
    """Terms whose second moments differ by many orders of magnitude, some the same, some dead."""
    rng = np.random.default_rng(spread)
    rows = rng.normal(size=(2, 500, 6)) * 10.0 ** np.linspace(0, -spread, 6)
    rows[:, :, 3] = rows[:, :, 2]
    if dead:
        rows[1] = 0
    moment = rows.swapaxes(1, 2) @ rows / 500
    feedback = compensation.Feedback.of(moment)
    assert np.isfinite(feedback.weights).all()
    weight = rng.normal(size=(2, 3, 6)).astype(np.float32)
    levels = Levels(IntFormat.full(4, signed=True), np.zeros((2, 3), np.float32))
    integers = compensation.compensated_rounding(weight, np.full((2, 3), 0.25, np.float32), feedback, levels)
    assert np.isfinite(integers).all()
    assert np.isfinite(
        compensation.corrected_target(
            weight, moment, moment[:, :, :] @ weight.swapaxes(1, 2), np.ones((2, 3)), 0
        )
    ).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30_000), st.floats(0.0, 1.2), st.integers(0, 99))
def test_positions_are_drawn_without_repetition_in_order_and_about_as_many_as_wanted(available, share, seed):
    drawn = drawn_places(available, share, np.random.default_rng(seed))
    assert (np.diff(drawn) > 0).all()
    assert len(drawn) >= 1
    assert drawn[0] >= 0
    assert drawn[-1] < available
    expected = available * min(share, 1.0)
    assert abs(len(drawn) - expected) <= 6 * np.sqrt(expected) + 6
