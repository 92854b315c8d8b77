"""Gains that give a quantized layer's outputs the slope and mean of the float network's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from eptq_onnx.numerics.types import Array, Float64

MOST_GAIN = 1.1
"""Largest correction of an output's slope: where little of the float output is left, more amplifies noise."""


@dataclass(frozen=True)
class Comparison:
    """Sums over positions of a layer's float and quantized outputs, sample by sample.

    Where samples and positions share the first axis, every position counts as a sample.

    Parameters
    ----------
    positions : ndarray of shape (n_samples, 1)
        Number of positions.
    exact, quantized : ndarray of shape (n_samples, n_channels)
        Sums of the float and of the quantized values.
    power, product : ndarray of shape (n_samples, n_channels)
        Sums of the squared float values, and of their products with the quantized values.
    """

    positions: Float64
    exact: Float64
    quantized: Float64
    power: Float64
    product: Float64

    @classmethod
    def of(cls, exact: Array | Float64, quantized: Array | Float64) -> Comparison:
        """Build from the outputs of a batch, with channels along the last axis."""
        x, y = (v.reshape(len(v), -1, v.shape[-1]).astype(np.float64) for v in (exact, quantized))
        return cls(
            np.full((len(x), 1), float(x.shape[1])),
            x.sum(axis=1),
            y.sum(axis=1),
            np.square(x).sum(axis=1),
            (x * y).sum(axis=1),
        )

    @classmethod
    def joined(cls, parts: Sequence[Comparison], share: float) -> Comparison:
        """Concatenate parts and keep the first ``share`` of their samples."""
        kept = round(share * sum(len(p.power) for p in parts))
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts])[:kept] for f in fields(cls)))

    @property
    def means(self) -> tuple[Float64, Float64]:
        """Return the mean float and the mean quantized value of each channel."""
        return self.exact.sum(axis=0) / self.positions.sum(), self.quantized.sum(
            axis=0
        ) / self.positions.sum()

    @property
    def gains(self) -> Float64:
        """Return the factor of each channel that makes the slope of quantized over float values 1.

        Factors are limited to `MOST_GAIN`. Slopes are shrunk towards a common slope where channels differ by
        no more than samples do (James and Stein 1961).
        """
        mean, other = self.means
        power = self.power - mean * (2 * self.exact - self.positions * mean)
        product = self.product - mean * self.quantized - other * (self.exact - self.positions * mean)
        total = power.sum(axis=0)
        varies = total > 0
        if not varies.any():
            return np.ones(len(total))
        total = np.where(varies, total, 1)
        common = product.sum() / power.sum()
        slope = np.where(varies, product.sum(axis=0) / total, common)
        count = len(power)
        doubt = np.square(product - slope * power).sum(axis=0) / np.square(total) * count / max(count - 1, 1)
        spread = max(0.0, float((np.square(slope - common) - doubt)[varies].mean())) if count > 1 else 0.0
        slope = common + spread / np.maximum(spread + doubt, 1e-30) * (slope - common)
        return np.asarray(1 / np.clip(slope, 1 / MOST_GAIN, MOST_GAIN))
