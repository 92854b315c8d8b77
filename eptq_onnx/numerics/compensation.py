"""Round a matrix so that its products are preserved. Pure numpy, no ONNX.

With second moments ``A = E[x_q x_qᵀ]`` of the inputs that a layer gets in the quantized network, and ``C =
E[x_q yᵀ]`` with the outputs ``y = W x_f`` of the float network, the weights that come closest to these
outputs are ``W* = Cᵀ A⁻¹`` (input-error correction), and integers Q cost ``tr((sQ - W*) A (sQ - W*)ᵀ)``. The
cost is minimized element by element, with each rounding error compensated by the elements that follow (OBQ,
Frantar & Alistarh 2022; GPTQ, Frantar et al. 2023), and then by coordinate descent.

This treats all outputs alike. With ``G = E[g gᵀ]`` of the network outputs' Hessian factor ``g = Jᵀ v`` (paper
section 3.1) the effect of the error on the network outputs is ``tr(G (sQ - W*) A (sQ - W*)ᵀ)``, in
Kronecker's approximation (K-FAC, Martens and Grosse 2015): outputs compensate each other's errors where the
rest of the network adds them up.

The first axis is always the group: weights (n_groups, n_outputs, n_terms), moments (n_groups, n_terms,
n_terms), scales (n_groups, n_outputs).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from eptq_onnx.numerics.gains import MOST_GAIN
from eptq_onnx.numerics.grid import Levels
from eptq_onnx.numerics.moments import Covariances
from eptq_onnx.numerics.types import Array, Float64
from eptq_onnx.parallel import ordered_map

_Matrix = TypeVar("_Matrix", Array, Float64)
"""Matrices of one precision."""

_SCALE_DAMPING, _MOST_REFIT = 1e-3, 2.0
"""Damping of jointly refitted scales, in units of their curvature, and the largest factor they change by."""

DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 1000.0)
"""Candidates of `best_damping`."""
_JUDGED_OUTPUTS = 64
"""Outputs of a group, evenly spread, whose errors choose its damping."""


_RIDGES, _TINY = (1e-14, 1e-12, 1e-10, 1e-8, 1e-6), 1e-30
"""Ridges for numerically singular matrices, in units of the largest diagonal element, and its minimum."""
_LARGE = 32
"""Terms from which on a Cholesky factorization of one group at a time is faster than one call for all."""
_BLOCK = 64
"""Columns corrected one by one before the rest is corrected in one matrix product."""


def _ridge(moment: _Matrix, damping: float | Float64) -> _Matrix:
    """Return ``damping * mean(diag A) I``, or the identity where A is 0 (inputs that never vary)."""
    mean = np.einsum("gii->gi", moment).mean(axis=1)
    height = np.where(mean > 0, damping * mean, 1.0).astype(moment.dtype)
    return height[:, None, None] * np.eye(moment.shape[1], dtype=moment.dtype)


def damped(moment: Float64, damping: float) -> Float64:
    """Return ``A + damping * mean(diag A) I``, whose diagonal is nowhere 0."""
    return moment + _ridge(moment, damping)


def corrected_target(
    weight: Array, moment: _Matrix, cross: _Matrix, power: _Matrix, damping: float | Float64
) -> Array:
    """Return the weights that map quantized inputs closest to the float outputs, without shrinking them.

    ``W* = g (C + mu Wᵀ)ᵀ (A + mu I)⁻¹`` with mu a share of A's mean diagonal: the larger, the closer to W.
    Least squares shrinks what it predicts from noisy inputs, layer after layer, and rare strong responses
    (objects, rare classes) suffer first. The gain g of each output compensates: it makes the slope of the
    corrected output over the float output 1.

    Parameters
    ----------
    weight : ndarray of shape (n_groups, n_outputs, n_terms)
    moment, cross, power : ndarray
        A, C and V of `Moments.covariances`.
    damping : float or ndarray of shape (n_groups,)
    """
    ridge = _ridge(moment, damping)
    pull = cross + np.einsum("gii->gi", ridge)[:, :, None] * weight.swapaxes(1, 2)
    target = _solved(moment + ridge, pull).swapaxes(1, 2)
    reached = (target * cross.swapaxes(1, 2)).sum(axis=2)
    gain = np.where(reached > 0, power / np.where(reached > 0, reached, 1), 1.0)
    return np.asarray(target * np.clip(gain, 1 / MOST_GAIN, MOST_GAIN)[:, :, None], np.float32)


def best_damping(weight: Array, halves: Sequence[Covariances]) -> Float64:
    """Return the damping of `corrected_target` with the least cross-validated error, for each group.

    Each half of the inputs judges the correction that is fitted to the other half.

    Parameters
    ----------
    weight : ndarray of shape (n_groups, n_outputs, n_terms)
    halves : sequence of Covariances
        Two, or none: then the middle candidate is returned.

    Returns
    -------
    ndarray of shape (n_groups,)
    """
    middle = len(DAMPINGS) // 2
    if not halves:
        return np.full(len(weight), DAMPINGS[middle])
    count = weight.shape[1]
    outputs = np.unique(np.linspace(0, count - 1, min(count, _JUDGED_OUTPUTS)).round().astype(np.int64))
    weight = weight[:, outputs]
    # Single precision tells dampings that differ by factors of three well apart.
    fits = [
        (a.astype(np.float32), c[:, :, outputs].astype(np.float32), v[:, outputs].astype(np.float32))
        for a, c, v in halves
    ]

    def error(tried: tuple[int, float]) -> Float64:
        own, damping = tried
        moment, cross, power = fits[1 - own]
        target = corrected_target(weight, *fits[own], damping)
        explained = (target * cross.swapaxes(1, 2)).sum(axis=(1, 2), dtype=np.float64)
        judged = cost(target, moment).sum(axis=1) - 2 * explained
        return np.asarray(judged + power.sum(axis=1, dtype=np.float64), np.float64)

    def both(k: int) -> Float64:
        return sum(ordered_map(error, [(own, DAMPINGS[k]) for own in range(2)]), np.zeros(len(weight)))

    # The error has one minimum: on either side, the search ends where no group gains any more.
    chosen, least = np.full(len(weight), middle), both(middle)
    for side in (range(middle + 1, len(DAMPINGS)), range(middle - 1, -1, -1)):
        for k in side:
            found = both(k)
            better = found < least
            chosen, least = np.where(better, k, chosen), np.where(better, found, least)
            if not better.any():
                break
    dampings: Float64 = np.asarray(DAMPINGS, np.float64)[chosen]
    return dampings


def cost(error: Array, moment: Array | Float64) -> Float64:
    """Return ``e A eᵀ`` of each row, the mean squared error of each output; shape (n_groups, n_outputs)."""
    return np.asarray(
        (np.matmul(error, moment.astype(np.float32, copy=False)) * error).sum(axis=2, dtype=np.float64)
    )


@dataclass(frozen=True)
class Feedback:
    """How the rounding error of a term is spread over the terms that are rounded after it.

    It is the same for all scales and widths.

    Parameters
    ----------
    order : ndarray of int, shape (n_groups, n_terms)
        Order of rounding: largest second moments first, so that the others are left to compensate.
    weights : ndarray of shape (n_groups, n_terms, n_terms)
        Row i holds the share of term i's error that each later term takes, in that order.
    """

    order: NDArray[np.int64]
    weights: Array

    @classmethod
    def of(cls, moment: Float64) -> Feedback:
        """Build from a positive definite moment A.

        The weights are the rows of the upper Cholesky factor of A⁻¹, divided by its diagonal.
        """
        order = np.argsort(-np.einsum("gii->gi", moment), axis=1, kind="stable")
        ordered = np.take_along_axis(np.take_along_axis(moment, order[:, :, None], 1), order[:, None, :], 2)
        factor = _inverse_factor(ordered).swapaxes(1, 2)
        return cls(order, (factor / np.einsum("gii->gi", factor)[:, :, None]).astype(np.float32))


def _inverse_factor(moment: Float64) -> Float64:
    """Return the lower Cholesky factor of the inverse of a positive definite moment."""
    factor = _regularized(moment, _factor_of_inverse)
    # Without numbers to go by, no error is spread.
    return np.broadcast_to(np.eye(moment.shape[1]), moment.shape).copy() if factor is None else factor


def _factor_of_inverse(moment: Float64) -> Float64:
    """Return the lower Cholesky factors of inverses.

    With rows and columns reversed, the Cholesky factor of A gives ``A = U Uᵀ`` with U upper triangular, and
    ``A⁻¹ = U⁻ᵀ U⁻¹``.
    """
    uppers = np.linalg.cholesky(moment[:, ::-1, ::-1])[:, ::-1, ::-1]
    one = np.eye(moment.shape[1])
    if len(one) < _LARGE:
        return np.asarray(np.linalg.inv(uppers).swapaxes(1, 2), np.float64)
    return np.stack([linalg.solve_triangular(u, one, check_finite=False).T for u in uppers])


def _solved(moment: _Matrix, right: _Matrix) -> _Matrix:
    """Solve linear systems with positive semidefinite matrices."""
    found = _regularized(moment, lambda raised: _solution(raised, right))
    return np.zeros_like(right) if found is None else found


def _solution(moment: _Matrix, right: _Matrix) -> _Matrix:
    if moment.shape[1] < _LARGE:
        # One call for all groups.
        return np.asarray(np.linalg.solve(moment, right), moment.dtype)
    factors = (linalg.cho_factor(a, check_finite=False) for a in moment)
    solved = [linalg.cho_solve(f, b, check_finite=False) for f, b in zip(factors, right, strict=True)]
    return np.asarray(solved, moment.dtype)


def _regularized(moment: _Matrix, work: Callable[[_Matrix], _Matrix]) -> _Matrix | None:
    """Return ``work`` of a matrix, its diagonal raised as little as helps; None if nothing helps.

    Where terms differ by more than float64 can tell apart, a matrix is numerically singular or not positive
    definite.
    """
    with suppress(np.linalg.LinAlgError):
        return work(moment)
    largest = np.maximum(np.einsum("gii->gi", moment).max(axis=1), _TINY)[:, None, None]
    one = np.eye(moment.shape[1], dtype=moment.dtype)
    for ridge in _RIDGES:
        with suppress(np.linalg.LinAlgError):
            return work(moment + moment.dtype.type(ridge) * largest * one)
    return None


def compensated_rounding(target: Array, scale: Array, feedback: Feedback, levels: Levels) -> Array:
    """Round column by column, with later columns compensating the errors of earlier ones.

    Parameters
    ----------
    target : ndarray of shape (n_groups, n_outputs, n_terms)
    scale : ndarray of shape (n_groups, n_outputs)
    feedback : Feedback
    levels : Levels
        The values of each row; zero points of shape (n_groups, n_outputs).

    Returns
    -------
    ndarray of float32
        Levels, in the shape of ``target``.
    """
    order, spread = feedback.order, feedback.weights
    rest = np.take_along_axis(target, order[:, None, :], 2) / scale[:, :, None]
    result = np.empty_like(rest)
    terms = rest.shape[2]
    for begin in range(0, terms, _BLOCK):
        end = min(begin + _BLOCK, terms)
        block = rest[:, :, begin:end]
        errors = np.empty_like(block)
        for i in range(end - begin):
            q = levels.nearest(block[:, :, i])
            result[:, :, begin + i] = q
            errors[:, :, i] = block[:, :, i] - q
            block[:, :, i + 1 :] -= errors[:, :, i, None] * spread[:, None, begin + i, begin + i + 1 : end]
        if end < terms:
            rest[:, :, end:] -= np.matmul(errors, spread[:, begin:end, end:])
    back = np.argsort(order, axis=1, kind="stable")
    return np.take_along_axis(result, back[:, None, :], 2)


def coordinate_descent(
    target: Array, integers: Array, scale: Array, moment: Float64, levels: Levels, passes: int
) -> Array:
    """Move one level at a time to its best value, with all others fixed.

    The cost is a parabola in each, so the level nearest to its minimum is best, whatever the steps.

    Returns
    -------
    ndarray of float32
        Levels whose cost is no higher.
    """
    a = moment.astype(np.float32)
    diagonal = np.einsum("gii->gi", a)
    q = integers.copy()
    terms = q.shape[2]
    for _ in range(passes):
        # In integer steps: the remaining error times A.
        pull = np.matmul(target / scale[:, :, None] - q, a)
        moved = False
        for begin in range(0, terms, _BLOCK):
            end = min(begin + _BLOCK, terms)
            steps = np.zeros_like(q[:, :, begin:end])
            local = pull[:, :, begin:end]
            for i in range(end - begin):
                column = q[:, :, begin + i]
                wanted = levels.nearest(column + local[:, :, i] / diagonal[:, None, begin + i])
                step = wanted - column
                if step.any():
                    q[:, :, begin + i] = wanted
                    steps[:, :, i] = step
                    local -= step[:, :, None] * a[:, None, begin + i, begin:end]
            if steps.any():
                moved = True
                if end < terms:
                    pull[:, :, end:] -= np.matmul(steps, a[:, begin:end, end:])
        if not moved:
            break
    return q


def refitted_scale(
    target: Array, integers: Array, scale: Array, moment: Float64, owners: NDArray[np.int64]
) -> Array:
    """Return the scales with the least cost for given integers.

    Parameters
    ----------
    target, integers : ndarray of shape (n_groups, n_outputs, n_terms)
    scale : ndarray of shape (n_scales,)
        Kept where no positive scale fits (a row of zeros).
    moment : ndarray of shape (n_groups, n_terms, n_terms)
        A.
    owners : ndarray of int, shape (n_groups, n_outputs)
        Index of each row's scale.
    """
    product = np.matmul(integers, moment.astype(np.float32))
    right, curvature = np.zeros(scale.size), np.zeros(scale.size)
    np.add.at(right, owners, (product * target).sum(axis=2, dtype=np.float64))
    np.add.at(curvature, owners, (product * integers).sum(axis=2, dtype=np.float64))
    fits = (curvature > 0) & (right > 0)
    return np.where(fits, right / np.where(fits, curvature, 1), scale).astype(np.float32)


def jointly_refitted_scale(
    target: Array,
    integers: Array,
    scale: Array,
    moment: Float64,
    output_moment: Float64,
    owners: NDArray[np.int64],
) -> Array:
    """Return the scales with the least effect on the network outputs for given integers.

    Parameters
    ----------
    target, integers, moment, output_moment : ndarray
        As in `joint_descent`.
    scale : ndarray of shape (n_scales,)
    owners : ndarray of int, shape (n_groups, n_outputs)
        Index of each row's scale.
    """
    system, right = np.zeros((scale.size, scale.size)), np.zeros(scale.size)
    for wanted, q, inputs, outputs, owner in zip(
        target, integers.astype(np.float64), moment, output_moment, owners, strict=True
    ):
        product = q @ inputs
        np.add.at(system, (owner[:, None], owner[None, :]), outputs * (product @ q.T))
        np.add.at(right, owner, ((outputs @ wanted) * product).sum(axis=1))
    # Scales that hardly matter stay, and none moves far.
    diagonal = np.diag(system)
    ridge = np.where(diagonal > 0, _SCALE_DAMPING * diagonal, 1.0)
    fitted: Float64 = _solved((system + np.diag(ridge))[None], (right + ridge * scale)[None, :, None])
    return np.clip(fitted[0, :, 0], scale / _MOST_REFIT, scale * _MOST_REFIT).astype(np.float32)


def joint_descent(
    target: Array,
    integers: Array,
    scale: Array,
    moment: Float64,
    output_moment: Float64,
    levels: Levels,
    passes: int,
) -> Array:
    """Coordinate descent on the effect of each group's errors on the network outputs, ``tr(G E A Eᵀ)``.

    Parameters
    ----------
    target, integers : ndarray of shape (n_groups, n_outputs, n_terms)
    scale : ndarray of shape (n_groups, n_outputs)
    moment : ndarray of shape (n_groups, n_terms, n_terms)
        A.
    output_moment : ndarray of shape (n_groups, n_outputs, n_outputs)
        G.
    levels : Levels
        The values of each row; zero points of shape (n_groups, n_outputs).
    passes : int

    Returns
    -------
    ndarray of float32
        Levels whose cost is no higher.
    """
    groups = zip(target, integers, scale, moment, output_moment, strict=True)
    return np.stack([_joint_descent(*group, levels[k], passes) for k, group in enumerate(groups)])


def _joint_descent(
    target: Array,
    integers: Array,
    scale: Array,
    moment: Float64,
    output_moment: Float64,
    levels: Levels,
    passes: int,
) -> Array:
    """Run `joint_descent` on one group."""
    q, s = integers.astype(np.float64), scale.astype(np.float64)
    terms = q.shape[1]
    for _ in range(passes):
        pull = output_moment @ (target - s[:, None] * q) @ moment
        moved = False
        for begin in range(0, terms, _BLOCK):
            end = min(begin + _BLOCK, terms)
            effects = np.zeros((len(q), end - begin))
            local = pull[:, begin:end]
            for i in range(end - begin):
                t = begin + i
                effect = _descend_column(q[:, t], s, local[:, i], moment[t, t], output_moment, levels)
                if effect is not None:
                    effects[:, i] = effect
                    local[:, i + 1 :] -= np.outer(effect, moment[t, t + 1 : end])
            if effects.any():
                moved = True
                pull[:, end:] -= effects @ moment[begin:end, end:]
        if not moved:
            break
    return q.astype(np.float32)


def _descend_column(
    column: Float64, scale: Float64, pull: Float64, variance: float, output_moment: Float64, levels: Levels
) -> Float64 | None:
    """Move levels of one column in place, the most useful move first.

    Returns G times the moves, or None if there are none.
    """
    curvature = scale * np.diag(output_moment) * variance
    effect: Float64 | None = None
    for _ in range(2 * len(column)):
        wanted = levels.nearest(column + pull / curvature) - column
        gain = scale * wanted * (2 * pull - wanted * curvature)
        best = int(np.argmax(gain))
        if gain[best] <= 1e-9 * curvature[best] * scale[best]:
            break
        step = scale[best] * wanted[best]
        column[best] += wanted[best]
        push = step * output_moment[best]
        pull -= push * variance
        effect = push if effect is None else effect + push
    return effect
