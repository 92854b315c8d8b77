"""Weights that are being rounded: what an optimizer changes, and the weight that it stands for. Pure numpy,
no ONNX."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.formats import along_axis
from eptq_onnx.numerics.grid import nearest
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.numerics.types import Array, IntArray, QuantParams, QuantSpec


class RoundedWeight(Protocol):
    """A weight that is being rounded; ``variable`` is what the optimizer changes."""

    variable: Array
    scale: Array
    gamma: Array

    def forward(self) -> Array:
        """The weight to run the network with."""
        ...

    def backward(self, gradient: Array, penalty: float, exponent: float) -> tuple[Array, Array]:
        """Gradients of ``variable`` and ``gamma``, given dL/dW and the strength and exponent of the
        penalty."""
        ...

    def penalty(self, exponent: float) -> float:
        """Penalty on undecided elements."""
        ...

    def harden(self) -> tuple[IntArray, QuantParams]:
        """Integers, scales and zero points with every element decided."""
        ...


def _gamma_slope(gradient: Array, level: Array, scale: Array, spec: QuantSpec) -> Array:
    """Gradient of gamma; 0 where the runtime does not take any scale, so that integers are learned for the
    scale that is written."""
    slope = quant_math.channel_sum(gradient * level * scale, spec.axis)
    return slope if spec.scales is ScaleRule.ANY else np.zeros_like(slope)


class StraightThroughWeight:
    """A weight that is rounded in every forward pass; its gradient passes the rounding unchanged.

    ``W = (clip(round(u), qmin, qmax) - z) * s * gamma`` with a continuous copy u of the weight in integer
    steps.
    """

    def __init__(self, position: Array, params: QuantParams, spec: QuantSpec) -> None:
        self.spec = spec
        self.scale, self._zero_point = params.scale, params.zero_point
        self._s, self._z = quant_math.grid(params, spec).spread(position.shape)
        self.variable: Array = position
        self.gamma: Array = np.ones_like(params.scale)
        self._level: Array = np.zeros(0, np.float32)

    def forward(self) -> Array:
        """The rounded weight."""
        self._level = np.clip(nearest(self.variable), self.spec.qmin, self.spec.qmax) - self._z
        return self._level * self._factor()

    def backward(self, gradient: Array, penalty: float, exponent: float) -> tuple[Array, Array]:
        """Gradients of u and gamma, given dL/dW."""
        return gradient * self._factor(), _gamma_slope(gradient, self._level, self._s, self.spec)

    def penalty(self, exponent: float) -> float:
        """0: every weight is always decided."""
        return 0.0

    def harden(self) -> tuple[IntArray, QuantParams]:
        """Integers, scales and zero points."""
        integers = np.clip(nearest(self.variable), self.spec.qmin, self.spec.qmax).astype(self.spec.container)
        return integers, self.spec.params(self.scale * self.gamma, self._zero_point)

    def _factor(self) -> Array:
        return self._s * along_axis(self.gamma, self.spec.axis, self.variable.ndim)


class SoftWeight:
    """A weight whose elements are between rounding down and rounding up.

    ``W = (clip(floor(u) + h(alpha), qmin, qmax) - z) * s * gamma`` per channel (AdaRound; gamma is the
    learned factor).

    Parameters
    ----------
    position : ndarray
        u, the weight in integer steps.
    params : QuantParams
        Gives s and z.
    spec : QuantSpec
    """

    def __init__(self, position: Array, params: QuantParams, spec: QuantSpec) -> None:
        self.spec = spec
        self.scale, self._zero_point = params.scale, params.zero_point
        self._s, self._z = quant_math.grid(params, spec).spread(position.shape)
        self.floor: Array = np.floor(position)
        self.variable: Array = quant_math.rectified_sigmoid_inverse(position - self.floor)
        self.gamma: Array = np.ones_like(params.scale)
        self._h: Array = np.zeros(0, np.float32)
        self._level: Array = np.zeros(0, np.float32)

    def forward(self) -> Array:
        """The soft weight."""
        self._h = quant_math.rectified_sigmoid(self.variable)
        self._level = np.clip(self.floor + self._h, self.spec.qmin, self.spec.qmax) - self._z
        return self._level * self._factor()

    def backward(self, gradient: Array, penalty: float, exponent: float) -> tuple[Array, Array]:
        """Gradients of alpha and gamma, given dL/dW and the strength and exponent of the rounding penalty."""
        d_gamma = _gamma_slope(gradient, self._level, self._s, self.spec)
        raw = self.floor + self._h
        inside = (raw >= self.spec.qmin) & (raw <= self.spec.qmax)
        d_h = gradient * self._factor() * inside
        if penalty:
            d_h += np.float32(penalty) * quant_math.rounding_penalty_slope(self._h, exponent)
        return d_h * quant_math.rectified_sigmoid_slope(self.variable), d_gamma

    def penalty(self, exponent: float) -> float:
        """Rounding penalty of the current soft weight."""
        return quant_math.rounding_penalty(self._h, exponent)

    def harden(self) -> tuple[IntArray, QuantParams]:
        """Integers, scales and zero points with every element decided: up where alpha >= 0."""
        up = self.variable >= 0
        integers = np.clip(self.floor + up, self.spec.qmin, self.spec.qmax).astype(self.spec.container)
        return integers, self.spec.params(self.scale * self.gamma, self._zero_point)

    def _factor(self) -> Array:
        return self._s * along_axis(self.gamma, self.spec.axis, self.floor.ndim)
