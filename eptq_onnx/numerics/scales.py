"""The scales that a runtime accepts."""

from __future__ import annotations

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


def _power(exponent: NDArray[np.integer], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return two to the given powers where the scale is a positive number, else the scale."""
    power = np.ldexp(np.float32(1), np.clip(exponent, _LEAST, _MOST))
    return np.asarray(np.where((scale > 0) & np.isfinite(scale), power, scale), np.float32)
