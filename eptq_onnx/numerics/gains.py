"""How the outputs of a layer compare with those of the float network: the gains that would make them
alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from eptq_onnx.numerics.types import Array, Float64

MOST_GAIN = 1.1
"""Largest correction of an output's slope: where almost nothing of the float output is left, a gain would
amplify noise."""


@dataclass(frozen=True)
class Comparison:
    """A layer's outputs in the float and in the quantized network, summed over the positions of every sample.

    Where samples and positions share the first axis, every position counts as a sample.

    Parameters
    ----------
    positions : ndarray of shape (n_samples, 1)
        Their number.
    exact, rough : ndarray of shape (n_samples, n_channels)
        Sums of float and of quantized values.
    power, product : ndarray of shape (n_samples, n_channels)
        Sums of the squared float values, and of their products with the quantized.
    """

    positions: Float64
    exact: Float64
    rough: Float64
    power: Float64
    product: Float64

    @classmethod
    def of(cls, exact: Array, rough: Array) -> Comparison:
        """From the outputs of a batch, channels along the last axis."""
        x, y = (v.reshape(len(v), -1, v.shape[-1]).astype(np.float64) for v in (exact, rough))
        return cls(
            np.full((len(x), 1), float(x.shape[1])),
            x.sum(axis=1),
            y.sum(axis=1),
            np.square(x).sum(axis=1),
            (x * y).sum(axis=1),
        )

    @classmethod
    def joined(cls, parts: Sequence[Comparison], share: float) -> Comparison:
        """The first of all samples, this share of them."""
        kept = round(share * sum(len(p.power) for p in parts))
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts])[:kept] for f in fields(cls)))

    @property
    def means(self) -> tuple[Float64, Float64]:
        """Of the float and of the quantized values of each channel."""
        return self.exact.sum(axis=0) / self.positions.sum(), self.rough.sum(axis=0) / self.positions.sum()

    @property
    def gains(self) -> Float64:
        """What each channel's quantized values lack to have the slope 1 over the float values, near 1.

        Slopes of channels that differ by no more than the samples disagree are taken to be the same (James
        and Stein 1961).
        """
        mean, other = self.means
        power = self.power - mean * (2 * self.exact - self.positions * mean)
        product = self.product - mean * self.rough - other * (self.exact - self.positions * mean)
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
