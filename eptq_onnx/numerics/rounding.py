"""Weights during optimization: the variable that the optimizer changes, and the weight it stands for.

Pure numpy, no ONNX.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.formats import along_axis
from eptq_onnx.numerics.grid import Grid, nearest
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.numerics.spec import QuantSpec
from eptq_onnx.numerics.types import Array, Values

ZETA, GAMMA = 1.1, -0.1
"""Stretch of the rectified sigmoid (AdaRound, Nagel et al. 2020, equation 23)."""


def rectified_sigmoid(alpha: Array) -> Array:
    """Return ``h(a) = clip((zeta - gamma) * sigmoid(a) + gamma, 0, 1)`` (paper equation 9)."""
    result: Array = np.clip((ZETA - GAMMA) * _sigmoid(alpha) + GAMMA, 0, 1).astype(np.float32)
    return result


def rectified_sigmoid_slope(alpha: Array) -> Array:
    """Return ``dh/da``, which is 0 where h is clipped."""
    s = _sigmoid(alpha)
    stretched = (ZETA - GAMMA) * s + GAMMA
    result: Array = ((ZETA - GAMMA) * s * (1 - s) * ((stretched > 0) & (stretched < 1))).astype(np.float32)
    return result


def rectified_sigmoid_inverse(h: Array) -> Array:
    """Return the ``a`` with ``h(a) = h`` for h in [0, 1]."""
    s = np.clip((h - GAMMA) / (ZETA - GAMMA), 1e-4, 1 - 1e-4)
    result: Array = np.log(s / (1 - s)).astype(np.float32)
    return result


def _sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * np.tanh(0.5 * x) + 0.5, np.float32)


def rounding_penalty(h: Array, exponent: float) -> float:
    """Return ``sum(1 - |2h - 1|**exponent)`` (AdaRound's regularizer): 0 once every weight is decided."""
    return float(h.size - (np.abs(2 * h - 1) ** np.float32(exponent)).sum(dtype=np.float64))


def rounding_penalty_slope(h: Array, exponent: float) -> Array:
    """Return the derivative of `rounding_penalty` with respect to h."""
    centred = 2 * h - 1
    result: Array = (-2 * exponent * np.sign(centred) * np.abs(centred) ** np.float32(exponent - 1)).astype(
        np.float32
    )
    return result


class RoundedWeight(Protocol):
    """A weight whose rounding is learned; ``variable`` is what the optimizer changes."""

    variable: Array
    scale: Array
    gamma: Array

    def forward(self) -> Array:
        """Return the weight to run the network with."""
        ...

    def backward(self, gradient: Array, penalty: float, exponent: float) -> tuple[Array, Array]:
        """Return the gradients of ``variable`` and ``gamma``, given dL/dW and the penalty's parameters."""
        ...

    def penalty(self, exponent: float) -> float:
        """Return the penalty on undecided elements."""
        ...

    def harden(self) -> tuple[Values, Grid]:
        """Return the values of the format and their grid with every element decided."""
        ...


def _gamma_slope(gradient: Array, level: Array, scale: Array, spec: QuantSpec) -> Array:
    """Return the gradient of gamma; 0 if the runtime restricts scales.

    The values are then learned for the scale that is written.
    """
    slope = quant_math.channel_sum(gradient * level * scale, spec.axis)
    return slope if spec.scales is ScaleRule.ANY else np.zeros_like(slope)


class StraightThroughWeight:
    """A weight that is rounded in every forward pass, with a straight-through gradient.

    ``W = (v(round(u)) - z) * s * gamma`` with a continuous copy u of the weight, a position among the values
    v of the format. Integers are their own positions, clipped to the range.
    """

    def __init__(self, position: Array, grid: Grid, spec: QuantSpec) -> None:
        self.spec = spec
        self.scale, self._zero_point = grid.scale, grid.zero_point
        self._s, self._z = grid.spread(position.shape)
        self.variable: Array = position
        self.gamma: Array = np.ones_like(grid.scale)
        self._level: Array = np.zeros(0, np.float32)

    def forward(self) -> Array:
        """Return the rounded weight."""
        self._level = self.spec.format.at(nearest(self.variable)) - self._z
        return self._level * self._factor()

    def backward(self, gradient: Array, penalty: float, exponent: float) -> tuple[Array, Array]:
        """Return the gradients of u and gamma, given dL/dW."""
        slope = self._factor() * self.spec.format.gap(self.variable)
        return gradient * slope, _gamma_slope(gradient, self._level, self._s, self.spec)

    def penalty(self, exponent: float) -> float:
        """Return 0: every element is always decided."""
        return 0.0

    def harden(self) -> tuple[Values, Grid]:
        """Return the values of the format and their grid."""
        form = self.spec.format
        values = np.asarray(form.at(nearest(self.variable)), form.container)
        return values, self.spec.grid(self.scale * self.gamma, self._zero_point)

    def _factor(self) -> Array:
        return self._s * along_axis(self.gamma, self.spec.axis, self.variable.ndim)


class SoftWeight:
    """A weight whose elements lie between rounding down and rounding up.

    ``W = (v(floor(u) + h(alpha)) - z) * s * gamma`` per channel (AdaRound; gamma is the learned factor), with
    v(p) the value of the format at position p, linear between neighbours.

    Parameters
    ----------
    position : ndarray
        u, the position of the weight among the values of the format.
    grid : Grid
        Provides s and z.
    spec : QuantSpec
    """

    def __init__(self, position: Array, grid: Grid, spec: QuantSpec) -> None:
        self.spec = spec
        self.scale, self._zero_point = grid.scale, grid.zero_point
        self._s, self._z = grid.spread(position.shape)
        self.floor: Array = np.floor(position)
        self.variable: Array = rectified_sigmoid_inverse(position - self.floor)
        self.gamma: Array = np.ones_like(grid.scale)
        self._h: Array = np.zeros(0, np.float32)
        self._level: Array = np.zeros(0, np.float32)

    def forward(self) -> Array:
        """Return the soft weight."""
        self._h = rectified_sigmoid(self.variable)
        self._level = self.spec.format.at(self.floor + self._h) - self._z
        return self._level * self._factor()

    def backward(self, gradient: Array, penalty: float, exponent: float) -> tuple[Array, Array]:
        """Return the gradients of alpha and gamma, given dL/dW and the penalty's strength and exponent."""
        d_gamma = _gamma_slope(gradient, self._level, self._s, self.spec)
        # Between the floor and the next position.
        slope = self._factor() * self.spec.format.gap(self.floor + np.float32(0.5))
        d_h = gradient * slope * self.spec.format.is_inside(self.floor + self._h)
        if penalty:
            d_h += np.float32(penalty) * rounding_penalty_slope(self._h, exponent)
        return d_h * rectified_sigmoid_slope(self.variable), d_gamma

    def penalty(self, exponent: float) -> float:
        """Return the rounding penalty of the current soft weight."""
        return rounding_penalty(self._h, exponent)

    def harden(self) -> tuple[Values, Grid]:
        """Return the values of the format and their grid, every element decided: up where alpha >= 0."""
        form = self.spec.format
        values = np.asarray(form.at(self.floor + (self.variable >= 0)), form.container)
        return values, self.spec.grid(self.scale * self.gamma, self._zero_point)

    def _factor(self) -> Array:
        return self._s * along_axis(self.gamma, self.spec.axis, self.floor.ndim)
