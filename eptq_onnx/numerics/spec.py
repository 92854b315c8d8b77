"""How a tensor is quantized, before its range is known."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from eptq_onnx.numerics.formats import Format, Granularity, PerAxis, PerTensor
from eptq_onnx.numerics.grid import Grid
from eptq_onnx.numerics.scales import GivenScales, ScaleRule
from eptq_onnx.numerics.types import Array, IntArray


@dataclass(frozen=True)
class QuantSpec:
    """Quantization that a runtime allows for one tensor; a scale and a zero point turn it into a `Grid`.

    Parameters
    ----------
    format : IntFormat or FloatFormat
    granularity : PerTensor, PerAxis or PerBlock
    zero_points : tuple of int
        Smallest and largest zero point allowed. A weight's zero point is folded into its stored integers,
        because integer kernels expect the zero point 0; the limits keep these integers in the range that the
        target stores.
    scales : ScaleRule or GivenScales
        The scales that the runtime accepts, or those that are given.
    least_range : float
        Smallest real range that the format's values cover.
    """

    format: Format
    granularity: Granularity = field(default_factory=PerTensor)
    zero_points: tuple[int, int] = (0, 0)
    scales: ScaleRule | GivenScales = ScaleRule.ANY
    least_range: float = 0.0

    @property
    def bits(self) -> int:
        """Return the bit width."""
        return self.format.bits

    @property
    def qmin(self) -> int:
        """Return the smallest value of the format."""
        return self.format.qmin

    @property
    def qmax(self) -> int:
        """Return the largest value of the format."""
        return self.format.qmax

    @property
    def axis(self) -> int | None:
        """Return the axis with one scale per index; None for one scale per tensor."""
        return self.granularity.axis if isinstance(self.granularity, PerAxis) else None

    @property
    def symmetric(self) -> bool:
        """Return True if the zero point is always 0."""
        return self.zero_points == (0, 0)

    @property
    def is_given(self) -> bool:
        """Return True if the integers are given."""
        return isinstance(self.scales, GivenScales) and self.scales.exact

    def grid(self, scale: Array, zero_point: int | IntArray = 0) -> Grid:
        """Return the grid with the allowed scale nearest to the given one.

        All grids are made here, so every scale follows the rule.

        Parameters
        ----------
        scale : ndarray of float32, scalar or of shape (n_channels,)
        zero_point : int, or ndarray of the scale's shape
        """
        allowed = self.scales.nearest(np.asarray(scale, np.float32))
        return Grid(self.format, self.granularity, allowed, zero_point)
