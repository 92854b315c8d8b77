"""Arrays, and how a tensor is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.numerics.scales import ScaleRule

Array: TypeAlias = NDArray[np.float32]
Float64: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.integer[Any]]
Feeds: TypeAlias = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized, before any range is known.

    Parameters
    ----------
    bits : int
        Nominal bit width.
    qmin, qmax : int
        Integer range that the values are kept in; it may be narrower than the container's.
    container : str
        Integer type that the runtime stores: ``"int8"``, ``"uint8"``, ``"int16"`` or ``"uint16"``.
    symmetric : bool
        True if the zero point is 0.
    axis : int or None
        Axis with one scale per index (per-channel), or None for one scale per tensor.
    zero_points : tuple of int
        Least and largest zero point of a weight. It is folded into the stored integers, which have the zero
        point 0 that integer kernels want: the limits keep them in the range that the target stores.
    scales : ScaleRule
        Which scales the runtime takes.
    """

    bits: int
    qmin: int
    qmax: int
    container: str
    symmetric: bool
    axis: int | None = None
    zero_points: tuple[int, int] = (0, 0)
    scales: ScaleRule = ScaleRule.ANY

    @property
    def width(self) -> int:
        """Bits of the container."""
        return 16 if self.container.endswith("16") else 8

    @property
    def narrower_than_container(self) -> bool:
        """True if the container can hold integers outside ``[qmin, qmax]``."""
        info = np.iinfo(self.container)
        return bool(self.qmin > info.min or self.qmax < info.max)

    def params(self, scale: Array, zero_point: int | IntArray = 0) -> QuantParams:
        """The parameters with the allowed scale nearest to a given one: all parameters are made here, so that
        no scale is off the rule.

        Parameters
        ----------
        scale : ndarray of float32, scalar or of shape (n_channels,)
        zero_point : int, or ndarray of the scale's shape
        """
        return QuantParams(self.scales.nearest(np.asarray(scale, np.float32)), zero_point)


@dataclass(frozen=True)
class QuantParams:
    """Scale and zero point of one tensor: ``real = (integer - zero_point) * scale``.

    Parameters
    ----------
    scale : ndarray of float32, scalar or of shape (n_channels,)
    zero_point : int, or ndarray of the scale's shape
        One in all for activations.
    """

    scale: Array
    zero_point: int | IntArray = 0
