"""Distribution of the magnitudes in each channel of a tensor. Pure numpy, no ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.types import Array, Float64

VALUES = 16_384
"""Values sampled from each sample, about."""
_OCTAVES, _BINS = 20, 3
"""Magnitudes are binned from ``2**-20`` to ``2**20``, with three bins per octave."""


class ChannelMagnitudes:
    """Histogram of the magnitudes in each channel of a tensor, on either side of 0.

    Parameters
    ----------
    sets : ndarray of int, shape (n_channels,)
        The set of tied channels that each channel belongs to.
    axis : int
        Channel axis.
    """

    def __init__(self, sets: NDArray[np.int64], axis: int) -> None:
        self.sets, self.positions = sets, 0.0
        self._axis = axis
        self._held: Array = np.zeros((2, 2, len(sets), 2 * _OCTAVES * _BINS), np.float32)
        """Counts and sums, below and above 0, of every channel and bin."""
        self._squares: Float64 = np.zeros(len(sets))

    def add(self, value: NDArray[np.floating], count: int) -> None:
        """Add a batch of ``count`` samples."""
        rows = np.moveaxis(value, self._axis, -1).reshape(-1, len(self.sets))
        self.positions = len(rows) / count
        rows = rows[:: quant_math.stride(len(rows), max(1, VALUES * count // rows.shape[1]))]
        if not np.isfinite(rows).all():
            rows = rows[np.isfinite(rows).all(axis=1)]
        size = np.abs(rows)
        places = (np.log2(np.maximum(size, 2.0**-_OCTAVES)) + _OCTAVES) * _BINS
        bins = np.minimum(places.astype(np.int64), 2 * _OCTAVES * _BINS - 1)
        keys = (
            ((rows > 0) * len(self.sets) + np.arange(len(self.sets))) * (2 * _OCTAVES * _BINS) + bins
        ).reshape(-1)
        # `is_bounded` reports sums that overflow float32.
        with np.errstate(over="ignore"):
            for k, weights in enumerate((None, size.reshape(-1))):
                self._held[k] += np.bincount(keys, weights, minlength=self._held[k].size).reshape(
                    self._held[k].shape
                )
        unit = quant_math.unit(size)
        self._squares += np.square(size / unit).sum(axis=0, dtype=np.float64) * float(unit) ** 2

    @property
    def _total(self) -> Float64:
        """Return the number of values in each channel."""
        return np.asarray(np.maximum(self._held[0].sum(axis=(0, 2), dtype=np.float64), 1), np.float64)

    @property
    def is_bounded(self) -> bool:
        """Return True if float32 holds the sums of all values seen."""
        return bool(np.isfinite(self._held).all())

    @property
    def power(self) -> Float64:
        """Return the mean square of each channel."""
        return np.asarray(self._squares / self._total)

    def side(self, side: int) -> Side:
        """Return the values below (0) or above (1) 0."""
        return Side.of(
            self._held[0][side].astype(np.float64), self._held[1][side].astype(np.float64), self._total
        )


@dataclass(frozen=True)
class Side:
    """Magnitudes of the values on one side of 0, each bin represented by its mean.

    Parameters
    ----------
    means : ndarray of shape (n_channels, n_bins)
    tails : ndarray of shape (3, n_channels, n_bins + 1)
        Share, sum and sum of squares of all bins from each one on, divided by the number of all values.
    """

    means: Float64
    tails: Float64

    @classmethod
    def of(cls, counts: Float64, sums: Float64, total: Float64) -> Side:
        """Build from the counts and sums of all bins, and the number of all values of each channel."""
        means = sums / np.maximum(counts, 1)
        parts = np.stack([counts, sums, sums * means]) / total[:, None]
        tails = np.zeros((*parts.shape[:2], parts.shape[2] + 1))
        tails[:, :, :-1] = parts[:, :, ::-1].cumsum(axis=2)[:, :, ::-1]
        return cls(means, tails)

    @classmethod
    def joined(cls, sides: Sequence[Side]) -> Side:
        """Concatenate the channels of several sides."""
        return cls(np.concatenate([s.means for s in sides]), np.concatenate([s.tails for s in sides], axis=1))

    @property
    def largest(self) -> Float64:
        """Return the largest magnitude of each channel."""
        return np.asarray(self.means.max(axis=1))

    def beyond(self, limit: Float64) -> tuple[Float64, Float64]:
        """Return the mean square beyond each channel's limit, and its slope for the limit's logarithm."""
        place = np.clip((np.log2(limit) + _OCTAVES) * _BINS, 0, self.means.shape[1] - 1).astype(np.int64)
        channel = np.arange(len(limit))
        place += self.means[channel, place] <= limit
        share, sums, squares = self.tails[:, channel, place]
        return squares - 2 * limit * sums + limit**2 * share, -2 * limit * (sums - limit * share)
