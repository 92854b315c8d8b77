"""Round the weight of one layer from the moments of its inputs. Pure numpy, no ONNX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.numerics import compensation, quant_math
from eptq_onnx.numerics.block_rounding import BlockProblem
from eptq_onnx.numerics.blocks import block_grid
from eptq_onnx.numerics.formats import PerBlock
from eptq_onnx.numerics.grid import Grid, Levels
from eptq_onnx.numerics.linear import WeightForm, scale_places
from eptq_onnx.numerics.moments import Moments
from eptq_onnx.numerics.scales import GivenScales, ScaleRule
from eptq_onnx.numerics.spec import QuantSpec
from eptq_onnx.numerics.types import Array, Float64, IntArray, Values

RATIOS = {ScaleRule.ANY: (1.0, 0.85, 0.7, 0.55), ScaleRule.POWER_OF_TWO: (1.0, 0.5)}
"""Scales to try, relative to the scale with the least squared error of the corrected weight."""
REFITS = 2
"""Rounds of refitting the scales to the integers and descending again."""
_OUTPUT_DAMPING = 0.1
"""Damping of the outputs' Hessian factor, over its mean diagonal: few probes leave directions unseen."""


class Damping(NamedTuple):
    """Damping of the input moments, in units of their mean diagonal."""

    correction: float | None
    """Damping of the input-error correction; None chooses it by cross-validation."""
    rounding: float
    """Damping of the moments that rounding minimizes the error for."""


@dataclass(frozen=True)
class LayerProblem:
    """Rounding problem of one layer.

    Parameters
    ----------
    form : WeightForm
    weight : ndarray
    units : tuple of float32
        Units of the moments' inputs and of the weight.
    spec : QuantSpec
    moments : Moments
    outputs : ndarray or None
        The Hessian factor of the layer's outputs.
    damping : Damping
    passes : int
        Passes of coordinate descent.
    """

    form: WeightForm
    weight: Array
    units: tuple[np.float32, np.float32]
    spec: QuantSpec
    moments: Moments
    outputs: Float64 | None
    damping: Damping
    passes: int

    def solve(self, least: Array) -> tuple[Values, Grid, Array]:
        """Return the values, their grid, with scales of at least ``least``, and the unrounded weights.

        The values are those of the format, in its container's type.
        """
        moment, cross, power = self.moments.covariances
        unit = self.units[1]
        rows, least = self.form.weight_rows(self.weight / unit), least / unit
        damping = self.damping.correction
        chosen = self._best_damping(rows) if damping is None else damping
        target = compensation.corrected_target(rows, moment, cross, power, chosen)
        moment = compensation.damped(moment, self.damping.rounding)
        if isinstance(self.spec.granularity, PerBlock):
            return self._in_blocks(target, moment, self.spec.granularity.size)
        full = self.form.weight_from_rows(target)
        base = quant_math.weight_scales(full, self.spec).reshape(-1)
        owners = scale_places(self.form, self.weight.shape, self.spec.axis)
        feedback = compensation.Feedback.of(moment)
        best = self._round(full, target, self._at_least(base, least), moment, feedback, owners)
        ratios = RATIOS[self.spec.scales] if isinstance(self.spec.scales, ScaleRule) else (1.0,)
        for ratio in ratios[1:] if self._thorough else ():
            other = self._round(
                full, target, self._at_least(base * np.float32(ratio), least), moment, feedback, owners
            )
            better = other.cost < best.cost
            best = _Rounded(
                np.where(better[owners][:, :, None], other.integers, best.integers),
                np.where(better, other.scale, best.scale),
                np.where(better, other.zero, best.zero),
                np.where(better, other.cost, best.cost),
            )
        passes = self.passes if self._thorough else min(self.passes, 1)
        levels = Levels(self.spec.format, best.zero[owners])
        integers, scale = self._in_turns(
            best.integers,
            best.scale,
            least,
            lambda q, s: compensation.coordinate_descent(target, q, s[owners], moment, levels, passes),
            lambda q, s: compensation.refitted_scale(target, q, s, moment, owners),
        )
        effect = self._output_moment(len(rows))
        if effect is not None and self._thorough:
            integers, scale = self._in_turns(
                integers,
                scale,
                least,
                lambda q, s: compensation.joint_descent(target, q, s[owners], moment, effect, levels, passes),
                lambda q, s: compensation.jointly_refitted_scale(target, q, s, moment, effect, owners),
            )
        places = ... if self.spec.axis is not None else 0
        grid = self.spec.grid(scale[places] * unit, best.zero[places])
        stored = self.form.weight_from_rows(integers + best.zero[owners][:, :, None])
        return stored.astype(self.spec.format.container), grid, full * unit

    def _in_blocks(self, target: Array, moment: Float64, size: int) -> tuple[Values, Grid, Array]:
        """Return what `solve` does, for a scale and a zero point for each block of terms."""
        unit, passes = self.units[1], self.passes if self._thorough else min(self.passes, 1)
        spec = replace(self.spec, granularity=PerBlock(2, size))
        # What clips or rounds a term that matters costs more.
        diagonal = np.einsum("gii->gi", moment)[:, None, :]
        start = block_grid(target, spec, np.asarray(diagonal / diagonal.mean(), np.float32))
        _, zero = start.spread(target.shape)
        levels = Levels(spec.format, np.broadcast_to(zero, target.shape))
        problem = BlockProblem(target, moment, levels, size)
        integers, scale = self._in_turns(
            problem.compensated(start.scale),
            start.scale,
            np.zeros(1, np.float32),
            lambda q, s: problem.descended(q, s.reshape(start.scale.shape), passes),
            lambda q, s: problem.refitted(q, s.reshape(start.scale.shape)),
        )
        back, points = self.form.weight_from_rows, np.asarray(start.zero_point)
        grid = self.spec.grid(
            back(scale.reshape(start.scale.shape)) * unit, back(points) if points.ndim else 0
        )
        values = back(integers + levels.zero).astype(spec.format.container)
        return values, grid, back(target) * unit

    @property
    def _thorough(self) -> bool:
        """True if scales are tried and integers are descended to the end.

        With many bits, the error that remains after compensated rounding is hardly that of the weights: the
        first scale, one refit and one pass of each descent serve as well.
        """
        return self.spec.bits <= quant_math.FEW_BITS

    def _best_damping(self, rows: Array) -> Float64:
        """Return the damping of the correction.

        All outputs of a group share it, even if their moments are separate.
        """
        apart = self.moments.apart
        return np.repeat(
            compensation.best_damping(
                rows.reshape(-1, apart * rows.shape[1], rows.shape[2]), self.moments.halves
            ),
            apart,
        )

    def _output_moment(self, groups: int) -> Float64 | None:
        """Return G of every group, of shape (n_groups, n_outputs, n_outputs).

        None if it is unknown or 0, or if groups have a single output.
        """
        if self.outputs is None or len(self.outputs) == groups or np.trace(self.outputs) <= 0:
            return None
        own = np.arange(groups)
        blocks = self.outputs.reshape(groups, len(self.outputs) // groups, groups, -1)[own, :, own, :]
        return compensation.damped(blocks, _OUTPUT_DAMPING)

    def _in_turns(
        self,
        integers: Array,
        scale: Array,
        least: Array,
        descend: Callable[[Array, Array], Array],
        refit: Callable[[Array, Array], Array],
    ) -> tuple[Array, Array]:
        """Alternate between integers for fixed scales and scales for fixed integers, ending with integers."""
        integers = descend(integers, scale)
        for _ in range(REFITS if self._thorough else 1):
            scale = self._at_least(refit(integers, scale), least)
            integers = descend(integers, scale)
        return integers, scale

    def _at_least(self, scale: Array, least: Array) -> Array:
        """Return the nearest allowed scales that are at least ``least``, of shape (n_scales,).

        There is one per channel, or one for the whole tensor.
        """
        rule = self.spec.scales.in_units(self.units[1])
        if isinstance(rule, GivenScales):
            return rule.nearest(scale.reshape(-1))
        scale, least = rule.nearest(scale.reshape(-1)), rule.above(least)
        return np.maximum(scale, least if scale.size == least.size else least.max())

    def _round(
        self,
        full: Array,
        target: Array,
        scale: Array,
        moment: Float64,
        feedback: compensation.Feedback,
        owners: NDArray[np.int64],
    ) -> _Rounded:
        per_row, zero = scale[owners], quant_math.zero_points(full, scale, self.spec)
        integers = compensation.compensated_rounding(
            target, per_row, feedback, Levels(self.spec.format, zero[owners])
        )
        value = compensation.cost(integers * per_row[:, :, None] - target, moment)
        costs = np.zeros(scale.size)
        np.add.at(costs, owners, value)
        return _Rounded(integers, scale, zero, costs)


@dataclass(frozen=True)
class _Rounded:
    """Levels of every row, with the scale, zero point and cost of every channel.

    Levels are values of the format minus the zero point.
    """

    integers: Array
    scale: Array
    zero: IntArray
    cost: NDArray[np.float64]
