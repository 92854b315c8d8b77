"""First-order optimizers on numpy arrays, state updated in place."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from eptq_onnx.numerics.types import Array

Key = TypeVar("Key", bound=Hashable)


def copy_into(arrays: Mapping[Key, Array], values: Mapping[Key, Array]) -> None:
    """Overwrite arrays in place with the values of the same names."""
    for name, array in arrays.items():
        array[...] = values[name]


class Adam:
    """Adam (Kingma and Ba 2015).

    Parameters
    ----------
    parameters : mapping of str to ndarray of float32
        Updated in place.
    beta1, beta2, epsilon : float
    """

    def __init__(
        self, parameters: Mapping[str, Array], beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8
    ) -> None:
        self.parameters = parameters
        self._beta1, self._beta2, self._epsilon = beta1, beta2, epsilon
        self._first = {n: np.zeros_like(p) for n, p in parameters.items()}
        self._second = {n: np.zeros_like(p) for n, p in parameters.items()}
        self._time = 0

    def step(self, gradients: Mapping[str, Array], rate: float) -> None:
        """Update the parameters that have a gradient."""
        self._time += 1
        correction = 1 - self._beta1**self._time
        for name, gradient in gradients.items():
            m, v = self._first[name], self._second[name]
            m *= np.float32(self._beta1)
            m += np.float32(1 - self._beta1) * gradient
            v *= np.float32(self._beta2)
            v += np.float32(1 - self._beta2) * np.square(gradient)
            self.parameters[name][...] -= np.float32(rate / correction) * self._direction(m, v)

    def saved(self) -> dict[str, Any]:
        """Return the optimizer state, without the parameters."""
        return {"first": self._first, "second": self._second, "time": self._time}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore what `saved` returned."""
        copy_into(self._first, saved["first"])
        copy_into(self._second, saved["second"])
        self._time = saved["time"]

    def _direction(self, m: Array, v: Array) -> Array:
        root = np.sqrt(v / np.float32(1 - self._beta2**self._time))
        result: Array = m / (root + np.float32(self._epsilon))
        return result


class MovingAverage(Generic[Key]):
    """Moving average of parameters, around which single steps fluctuate (Polyak and Juditsky 1992).

    Parameters
    ----------
    parameters : mapping of hashable to ndarray of float32
        Averaged, never changed.
    steps : float
        Length of the average, about; while there are fewer steps, all have the same weight.
    """

    def __init__(self, parameters: Mapping[Key, Array], steps: float) -> None:
        self._parameters, self._steps, self._seen = parameters, max(1.0, steps), 0
        self.values: dict[Key, Array] = {n: p.copy() for n, p in parameters.items()}

    def update(self) -> None:
        """Add the current values."""
        self._seen += 1
        pace = np.float32(1 / min(self._seen, self._steps))
        for name, value in self._parameters.items():
            mean = self.values[name]
            mean += pace * (value - mean)

    def saved(self) -> dict[str, Any]:
        """Return the averages and their state."""
        return {"values": self.values, "seen": self._seen}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore what `saved` returned."""
        copy_into(self.values, saved["values"])
        self._seen = saved["seen"]


class RAdam(Adam):
    """Rectified Adam (Liu et al. 2020).

    There is no update until the variance of the step size is tractable (five steps). The original falls back
    to plain momentum there, whose step depends on the scale of the loss.
    """

    def _direction(self, m: Array, v: Array) -> Array:
        longest = 2 / (1 - self._beta2) - 1
        power = self._beta2**self._time
        length = longest - 2 * self._time * power / (1 - power)
        if length <= 5:
            return np.zeros_like(m)
        rectified = np.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
        return np.float32(rectified) * super()._direction(m, v)
