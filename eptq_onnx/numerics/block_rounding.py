"""Round a matrix with a scale for each block of terms, so that its products are preserved. Pure numpy.

The same three steps as in `eptq_onnx.numerics.compensation`, for scales that differ between terms of a row:
compensated rounding (GPTQ with all scales chosen beforehand, so that terms may be rounded in any order),
coordinate descent over the integers, and refitted scales. Everything is in the units of the weight.

The first axis is the group: weights and levels have the shape (n_groups, n_outputs, n_terms).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eptq_onnx.numerics.compensation import Feedback
from eptq_onnx.numerics.grid import Levels
from eptq_onnx.numerics.types import Array, Float64

_TOGETHER = 64
"""Columns treated one by one before the rest is updated in one matrix product."""


@dataclass(frozen=True)
class BlockProblem:
    """A matrix to round.

    Parameters
    ----------
    target : ndarray of shape (n_groups, n_outputs, n_terms)
    moment : ndarray of shape (n_groups, n_terms, n_terms)
        Second moments of the inputs, positive definite.
    levels : Levels
        With a zero point for each element.
    size : int
        Terms of a block.
    """

    target: Array
    moment: Float64
    levels: Levels
    size: int

    def spread(self, scale: Array) -> Array:
        """Return the scale of every element, from those of the blocks."""
        return np.repeat(scale, self.size, axis=2)[:, :, : self.target.shape[2]]

    def compensated(self, scale: Array) -> Array:
        """Return levels, rounded column by column, with later columns making up for earlier errors.

        Parameters
        ----------
        scale : ndarray of shape (n_groups, n_outputs, n_blocks)
        """
        feedback = Feedback.of(self.moment)
        order, weights = feedback.order, feedback.weights
        places = order[:, None, :]
        rest = np.take_along_axis(self.target, places, 2)
        steps = np.take_along_axis(self.spread(scale), places, 2)
        zeros = np.take_along_axis(self.levels.zero, places, 2)
        result = np.empty_like(rest)
        terms = rest.shape[2]
        for begin in range(0, terms, _TOGETHER):
            end = min(begin + _TOGETHER, terms)
            block = rest[:, :, begin:end]
            errors = np.empty_like(block)
            for i in range(end - begin):
                own, column = steps[:, :, begin + i], block[:, :, i]
                levels = Levels(self.levels.format, zeros[:, :, begin + i])
                q = result[:, :, begin + i] = levels.nearest(column / own)
                errors[:, :, i] = column - q * own
                block[:, :, i + 1 :] -= (
                    errors[:, :, i, None] * weights[:, None, begin + i, begin + i + 1 : end]
                )
            if end < terms:
                rest[:, :, end:] -= np.matmul(errors, weights[:, begin:end, end:])
        back = np.argsort(order, axis=1, kind="stable")
        return np.take_along_axis(result, back[:, None, :], 2)

    def descended(self, integers: Array, scale: Array, passes: int) -> Array:
        """Return levels that cost no more, each moved to its best value in turn."""
        a = self.moment.astype(np.float32)
        diagonal = np.einsum("gii->gi", a)
        q, steps = integers.copy(), self.spread(scale)
        for _ in range(passes):
            pull, moved = np.matmul(self.target - q * steps, a), False
            for begin in range(0, q.shape[2], _TOGETHER):
                end = min(begin + _TOGETHER, q.shape[2])
                moves, local = np.zeros_like(q[:, :, begin:end]), pull[:, :, begin:end]
                for i in range(end - begin):
                    t = begin + i
                    levels = Levels(self.levels.format, self.levels.zero[:, :, t])
                    wanted = levels.nearest(
                        q[:, :, t] + local[:, :, i] / (diagonal[:, None, t] * steps[:, :, t])
                    )
                    move = (wanted - q[:, :, t]) * steps[:, :, t]
                    if move.any():
                        q[:, :, t] = wanted
                        moves[:, :, i] = move
                        local -= move[:, :, None] * a[:, None, t, begin:end]
                if moves.any():
                    moved = True
                    pull[:, :, end:] -= np.matmul(moves, a[:, begin:end, end:])
            if not moved:
                break
        return q

    def refitted(self, integers: Array, scale: Array) -> Array:
        """Return scales with a lower cost for given levels, one block after the other."""
        a, result = self.moment.astype(np.float32), scale.copy()
        pull = np.matmul(self.target - integers * self.spread(scale), a)
        for k in range(scale.shape[2]):
            part = slice(k * self.size, (k + 1) * self.size)
            q = integers[:, :, part]
            curvature = (np.matmul(q, a[:, part, part]) * q).sum(axis=2)
            gain = (pull[:, :, part] * q).sum(axis=2)
            wanted = result[:, :, k] + np.where(
                curvature > 0, gain / np.where(curvature > 0, curvature, 1), 0
            )
            # A scale that would change sign stays.
            move = np.where(wanted > 0, wanted - result[:, :, k], 0)
            result[:, :, k] += move
            pull -= np.matmul(move[:, :, None] * q, a[:, part])
        return result.astype(np.float32)

    def cost(self, integers: Array, scale: Array) -> float:
        """Return the mean squared error of all outputs."""
        error = self.target - integers * self.spread(scale)
        return float((np.matmul(error, self.moment.astype(np.float32)) * error).sum(dtype=np.float64))
