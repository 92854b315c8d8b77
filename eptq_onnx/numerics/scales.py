"""The scales that a runtime accepts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

_LEAST, _MOST = -149, 127
"""Smallest and largest exponent of a power of two in float32."""


class ScaleRule(str, Enum):
    """Restriction on scales; 0 and values that are not finite are always accepted."""

    ANY = "any"
    POWER_OF_TWO = "power of two"

    def above(self, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the smallest allowed scales that are at least ``scale``, within the range of float32."""
        if self is ScaleRule.ANY:
            return scale
        mantissa, exponent = np.frexp(scale)
        return _power(exponent - (mantissa == 0.5), scale)

    def nearest(self, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the nearest allowed scales."""
        if self is ScaleRule.ANY:
            return scale
        # 0.75 · 2**e is halfway between the neighbouring powers.
        mantissa, exponent = np.frexp(scale)
        return _power(exponent - (mantissa < 0.75), scale)

    def in_units(self, unit: np.float32) -> ScaleRule:
        """Return the rule for scales that are divided by a power of two."""
        return self


@dataclass(frozen=True)
class GivenScales:
    """Scales of a weight that are given: no others are allowed.

    Parameters
    ----------
    values : tuple of float
        One for the whole weight, or one per channel.
    exact : bool
        True if its integers are given, too: the weight is on their grid, and they stay.
    """

    values: tuple[float, ...]
    exact: bool

    def above(self, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the given scales, in the shape of others."""
        return np.asarray(self.values, np.float32).reshape(np.shape(scale))

    def nearest(self, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the given scales, in the shape of others."""
        return self.above(scale)

    def in_units(self, unit: np.float32) -> GivenScales:
        """Return the rule for scales that are divided by a power of two."""
        return GivenScales(tuple(float(np.float32(v) / unit) for v in self.values), self.exact)


@dataclass(frozen=True)
class WeightScales:
    """The scales of a weight in a quantized file, whose integers have no zero point.

    Parameters
    ----------
    bits : int
    values : tuple of float
        One for the whole weight, or one per channel.
    axis : int or None
        The axis of these channels.
    exact : bool
        True if the file has the integers alone; False if it has the float weight, too.
    """

    bits: int
    values: tuple[float, ...]
    axis: int | None
    exact: bool


def _power(exponent: NDArray[np.integer], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return two to the given powers where the scale is a positive number, else the scale."""
    power = np.ldexp(np.float32(1), np.clip(exponent, _LEAST, _MOST))
    return np.asarray(np.where((scale > 0) & np.isfinite(scale), power, scale), np.float32)
