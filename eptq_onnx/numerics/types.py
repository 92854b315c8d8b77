"""Array types, and the quantization parameters of a tensor."""

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
        Integer range of the values, which may be narrower than the container's.
    container : str
        Integer type that the runtime stores: ``"int8"``, ``"uint8"``, ``"int16"`` or ``"uint16"``.
    symmetric : bool
        True if the zero point is 0.
    axis : int or None
        Axis with one scale per index (per-channel), or None for one scale per tensor.
    zero_points : tuple of int
        Smallest and largest zero point of a weight. It is folded into the stored integers, whose own zero
        point is 0, as integer kernels expect; the limits keep these integers in the range that the target
        stores.
    scales : ScaleRule
        The scales that the runtime accepts.
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
        """Return the bits of the container."""
        return 16 if self.container.endswith("16") else 8

    @property
    def narrower_than_container(self) -> bool:
        """Return True if the container can hold integers outside ``[qmin, qmax]``."""
        info = np.iinfo(self.container)
        return bool(self.qmin > info.min or self.qmax < info.max)

    def params(self, scale: Array, zero_point: int | IntArray = 0) -> QuantParams:
        """Return parameters with the allowed scale nearest to the given one.

        All parameters are made here, so that every scale follows the rule.

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
        A single one for activations.
    """

    scale: Array
    zero_point: int | IntArray = 0
