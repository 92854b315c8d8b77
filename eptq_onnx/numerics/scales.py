"""Which scales a runtime takes."""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

_LEAST, _MOST = -149, 127
"""Exponents of the powers of two that float32 holds."""


class ScaleRule(str, Enum):
    """Which scales a runtime takes; 0 and what is no number fit any rule."""

    ANY = "any"
    POWER_OF_TWO = "power of two"

    def above(self, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """The least scales that the rule allows and that are no smaller, as far as float32 reaches."""
        if self is ScaleRule.ANY:
            return scale
        mantissa, exponent = np.frexp(scale)
        return _power(exponent - (mantissa == 0.5), scale)

    def nearest(self, scale: NDArray[np.float32]) -> NDArray[np.float32]:
        """The allowed scales with the least difference."""
        if self is ScaleRule.ANY:
            return scale
        # 0.75 · 2**e is the middle of the powers around it.
        mantissa, exponent = np.frexp(scale)
        return _power(exponent - (mantissa < 0.75), scale)


def _power(exponent: NDArray[np.integer], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Two to such powers, where the scale is a positive number; elsewhere the scale."""
    power = np.ldexp(np.float32(1), np.clip(exponent, _LEAST, _MOST))
    return np.asarray(np.where((scale > 0) & np.isfinite(scale), power, scale), np.float32)
