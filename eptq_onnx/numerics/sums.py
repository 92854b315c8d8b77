"""Sums over many values, in one reading of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.types import Array

_PART = 2**16
"""Values that are summed in float32 at once, by BLAS, while they are in the cache."""
_LEAST_POWER = 1e-20
"""Mean square above which float32 also holds the squares of much smaller differences."""
_ONES: Array = np.ones(_PART, np.float32)


class PowerSum:
    """Streaming mean square and variance.

    Sums of parts are in float32, sums of these in float64.
    """

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, 0.0, 0.0

    def add(self, values: NDArray[np.floating]) -> None:
        """Add finite values, of shape (n_values,)."""
        self._count += values.size
        for begin in range(0, values.size, _PART):
            part = values[begin : begin + _PART]
            if part.dtype == np.float32:
                self._sum += float(np.dot(part, _ONES[: part.size]))
            else:
                self._sum += float(part.sum(dtype=np.float64))
            self._squares += quant_math.square_sum(part)

    def join(self, other: PowerSum) -> None:
        """Add the values of another sum."""
        self._count += other._count
        self._sum += other._sum
        self._squares += other._squares

    @property
    def mean_square(self) -> float:
        """The mean square; 0 without values."""
        return self._squares / max(self._count, 1)

    @property
    def variance(self) -> float:
        """The variance; 0 without values."""
        return max(self.mean_square - (self._sum / max(self._count, 1)) ** 2, 0.0)


class NoiseSum:
    """Power of reference values, and of the differences of other values from them."""

    def __init__(self) -> None:
        self._power = self._noise = 0.0

    def add(self, expected: NDArray[Any], got: NDArray[Any]) -> None:
        """Compare two arrays; if their sizes differ, as may depend on values, the reference is all noise."""
        if got.shape == expected.shape and self._add_finite(expected.reshape(-1), got.reshape(-1)):
            return
        reference = expected.astype(np.float64)
        finite = np.isfinite(reference)
        self._power += float(np.square(reference[finite]).sum())
        difference = np.where(finite, reference, 0)
        if got.shape == reference.shape:
            # Positions that are not finite in the reference are skipped; if only the other is not finite, all
            # is lost.
            np.subtract(reference, got, out=difference, where=finite & np.isfinite(got))
        self._noise += float(np.square(difference).sum())

    def _add_finite(self, expected: NDArray[Any], got: NDArray[Any]) -> bool:
        """Add values of shape (n_values,) part by part, if float32 holds all sums; return whether it does."""
        if expected.dtype != np.float32 or got.dtype != np.float32:
            return False
        power = noise = 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            for begin in range(0, expected.size, _PART):
                part = expected[begin : begin + _PART]
                difference = part - got[begin : begin + _PART]
                power += float(np.dot(part, part))
                noise += float(np.dot(difference, difference))
        if not np.isfinite(power + noise) or power < _LEAST_POWER * expected.size:
            return False
        self._power += power
        self._noise += noise
        return True

    @property
    def sqnr_db(self) -> float:
        """The signal-to-quantization-noise ratio in dB."""
        return round(quant_math.sqnr_db(self._power, self._noise), 3)
