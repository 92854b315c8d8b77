"""Scales of blocks, and rounding with them, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eptq_onnx.numerics.block_rounding import BlockProblem
from eptq_onnx.numerics.blocks import block_grid
from eptq_onnx.numerics.formats import IntFormat, PerAxis, PerBlock, PerTensor
from eptq_onnx.numerics.grid import Levels
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.numerics.spec import QuantSpec


def unsigned(bits, axis, size, rule=ScaleRule.ANY):
    form = IntFormat.full(bits, signed=False)
    return QuantSpec(form, PerBlock(axis, size), (form.qmin, form.qmax), rule)


@given(
    granularity=st.sampled_from(
        [PerTensor(), PerAxis(0), PerAxis(1), PerBlock(0, 3), PerBlock(1, 4), PerBlock(-1, 2)]
    ),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 9)),
)
def test_rows_and_scales_belong_together(granularity, shape):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    rows = granularity.rows(values)
    largest = granularity.scales_of(np.abs(rows).max(axis=1), shape)
    assert largest.shape == granularity.scale_shape(shape)
    np.testing.assert_array_equal(granularity.flat(largest), np.abs(rows).max(axis=1))
    assert (np.abs(values) <= np.broadcast_to(granularity.spread(largest, shape), shape)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("axis", "size", "shape"), [(0, 32, (64, 5)), (1, 16, (5, 77)), (0, 32, (7, 3))])
def test_no_uniform_search_finds_much_better_scales(bits, axis, size, shape):
    weight = np.random.default_rng(bits).standard_t(5, shape).astype(np.float32)
    spec = unsigned(bits, axis, size)
    found = block_grid(weight, spec)
    assert found.scale.shape == spec.granularity.scale_shape(shape)
    error = np.square(found.round(weight) - weight)
    least = np.full(found.scale.shape, np.inf)
    for row in itertools.product(np.linspace(0.2, 1.1, 46), range(0, 2**bits, max(1, 2**bits // 16))):
        ratio, zero = row
        widest = block_grid(weight, spec, search=False).scale
        for near in (zero, None):
            points = found.zero_point if near is None else np.full(found.scale.shape, near, np.int32)
            tried = spec.grid((widest * ratio).astype(np.float32), points)
            squares = np.square(tried.round(weight) - weight)
            sums = np.add.reduceat(squares, np.arange(0, shape[axis], size), axis=axis)
            least = np.minimum(least, sums)
    own = np.add.reduceat(error, np.arange(0, shape[axis], size), axis=axis)
    # At 8 bits the best of a thousand grids owes it to chance: a block has fewer values than levels.
    assert own.sum() < (1.1 if bits < 8 else 2.0) * least.sum()
    points = np.asarray(found.zero_point)
    assert points.min() >= 0
    assert points.max() < 2**bits


def test_terms_that_matter_get_the_finer_range():
    weight = np.array([[0.1, 0.2, 0.3, 5.0]], np.float32)
    importance = np.array([[1.0, 1.0, 1.0, 1e-6]], np.float32)
    spec = unsigned(3, 1, 4)
    plain, weighed = (block_grid(weight, spec, h).round(weight) for h in (None, importance))
    assert np.square(weighed - weight)[0, :3].sum() < np.square(plain - weight)[0, :3].sum()


def test_scales_may_be_powers_of_two_and_tiny():
    weight = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
    found = block_grid(weight, unsigned(4, 1, 16, ScaleRule.POWER_OF_TWO))
    assert (np.frexp(found.scale)[0] == 0.5).all()
    for factor in (1e-25, 1e25, 0):
        grid = block_grid((weight * factor).astype(np.float32), unsigned(4, 1, 16))
        assert np.isfinite(grid.scale).all()
        assert (grid.scale > 0).all()
        np.testing.assert_allclose(grid.round(weight * np.float32(factor)), weight * factor, atol=factor)


def problem(bits=2, outputs=2, terms=5, size=2, seed=0):
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(1, outputs, terms)).astype(np.float32)
    inputs = rng.normal(size=(40, terms)) @ rng.normal(size=(terms, terms))
    moment = (inputs.T @ inputs / 40 + 0.01 * np.eye(terms))[None]
    grid = block_grid(target, unsigned(bits, 2, size))
    zero = grid.spread(target.shape)[1]
    return BlockProblem(target, moment, Levels(grid.format, zero), size), grid


@pytest.mark.parametrize("seed", range(4))
def test_compensation_and_descent_come_close_to_the_best_integers(seed):
    p, grid = problem(seed=seed)
    nearest = grid.quantize(p.target) - p.levels.zero
    rounded = p.compensated(grid.scale)
    done = p.descended(rounded, grid.scale, 5)
    costs = [p.cost(q, grid.scale) for q in (nearest, rounded, done)]
    values = np.array(list(itertools.product(range(4), repeat=5)), np.float32)
    best = sum(
        min(
            BlockProblem(p.target[:, [k]], p.moment, p.levels, p.size).cost(
                (v - p.levels.zero[0, k])[None, None], grid.scale[:, [k]]
            )
            for v in values
        )
        for k in range(2)
    )
    assert costs[2] <= costs[1] + 1e-6
    assert best - 1e-6 <= costs[2] <= max(1.6 * best, best + 0.05)
    assert costs[2] <= costs[0] + 1e-6
    inside = done + p.levels.zero
    assert inside.min() >= 0
    assert inside.max() <= 3


@given(seed=st.integers(0, 50), size=st.integers(1, 8), terms=st.integers(1, 9))
def test_refitted_scales_cost_less_and_are_those_of_least_squares_for_one_block(seed, size, terms):
    p, grid = problem(3, 3, terms, size, seed)
    q = p.compensated(grid.scale)
    scale = p.refitted(q, grid.scale)
    assert p.cost(q, scale) <= p.cost(q, grid.scale) * (1 + 1e-4) + 1e-6
    assert (scale > 0).all()
    if terms <= size:
        a = p.moment[0]
        for k in range(3):
            row = q[0, k].astype(np.float64)
            wanted = (row @ a @ p.target[0, k]) / max(row @ a @ row, 1e-30)
            if wanted > 1e-6:
                np.testing.assert_allclose(scale[0, k, 0], wanted, rtol=1e-2, atol=1e-4)


def test_with_one_block_a_row_it_is_what_scales_per_row_give():
    from eptq_onnx.numerics.compensation import Feedback, compensated_rounding

    p, grid = problem(4, 6, 70, 70)
    zero = np.asarray(grid.zero_point, np.float32)[:, :, 0]
    whole = compensated_rounding(
        p.target, grid.scale[:, :, 0], Feedback.of(p.moment), Levels(grid.format, zero)
    )
    assert (whole == p.compensated(grid.scale)).mean() > 0.99
