"""How integer biases are stored. Pure numpy, no ONNX."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eptq_onnx.numerics.grid import nearest
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.numerics.types import Array, IntArray

_MOST_SHIFT = 15
"""Most bits that an int8 bias is shifted by, when it is added to products of int8 (AMD Quark, XINT8)."""
_INT32_LIMIT = 2**30
"""Largest integer that an int32 bias may need: half of the range, so that learned values have room."""


def bias_scale(activation_scale: Array, weight_scale: Array) -> Array:
    """Return the product of the scales of a layer's input and weight, in float32."""
    return np.asarray(np.float32(activation_scale) * weight_scale, np.float32)


@dataclass(frozen=True)
class BiasSpec:
    """Integer biases, with zero point 0.

    Parameters
    ----------
    container : str
        ``"int32"``: the scale is the product of the scales of input and weight, as ONNX QLinearConv has it.
        ``"int8"``: a scale of its own, at least that product and at most ``2**15`` times as large.
    scales : ScaleRule
        The scales that the runtime accepts.
    zero_point : bool
        True if the zero point is written.
    """

    container: str = "int32"
    scales: ScaleRule = ScaleRule.ANY
    zero_point: bool = True

    def scale(self, bias: Array, activation_scale: Array, weight_scale: Array) -> Array:
        """Return the scale of a bias, of the weight scale's shape.

        Parameters
        ----------
        bias : ndarray of shape (n_channels,)
        activation_scale : ndarray, scalar
        weight_scale : ndarray, scalar or of shape (n_channels,)
        """
        product = bias_scale(activation_scale, weight_scale)
        if self.container == "int32":
            return product
        reach = np.abs(bias) if product.ndim else np.abs(bias).max(initial=0)
        wanted = self.scales.above(np.asarray(reach / self._largest, np.float32))
        return np.clip(wanted, product, product * np.float32(2**_MOST_SHIFT))

    def integers(self, bias: Array, activation_scale: Array, weight_scale: Array) -> IntArray:
        """Return the integers of a bias; parameters as in `scale`."""
        limits = np.iinfo(self.container)
        steps = nearest(bias.astype(np.float64) / self.scale(bias, activation_scale, weight_scale))
        return np.asarray(np.clip(steps, limits.min, limits.max), self.container)

    def round(self, bias: Array, activation_scale: Array, weight_scale: Array) -> Array:
        """Return the real values of a bias after rounding; parameters as in `scale`."""
        integers = self.integers(bias, activation_scale, weight_scale)
        return np.asarray(
            integers.astype(np.float32) * self.scale(bias, activation_scale, weight_scale), np.float32
        )

    def least_weight_scale(self, bias: Array, activation_scale: Array) -> Array:
        """Return the weight scale of each channel below which the bias may overflow; shape (n_channels,)."""
        room = np.float32(_INT32_LIMIT if self.container == "int32" else self._largest * 2**_MOST_SHIFT)
        # If the denominator overflows float32, the bias is no limit.
        with np.errstate(over="ignore"):
            return np.asarray(np.abs(bias) / (activation_scale * room), np.float32)

    @property
    def _largest(self) -> int:
        return int(np.iinfo(self.container).max)
