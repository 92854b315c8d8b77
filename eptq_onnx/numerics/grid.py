"""The quantization grid of a tensor: the only place where values are rounded.

``q(x) = (clip(round(x / s) + z) - z) s`` with half-to-even rounding, as ONNX QuantizeLinear and
DequantizeLinear compute it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.numerics.formats import FloatFormat, Format, Granularity, IntFormat, Storage
from eptq_onnx.numerics.types import Array, IntArray, Values

FINER = 2**8
"""How many steps of the grid of 16 bits one of 8 bits has; see `Grid.widened`."""
_FULL = 8
_PART = 2**20
"""Values of a large array processed at a time, so that intermediate results stay in the cache."""


def nearest(steps: NDArray[Any] | float) -> NDArray[Any]:
    """Return the nearest integers, rounding halves to even."""
    return np.asarray(np.rint(steps))


def nearest_float(values: NDArray[Any], form: FloatFormat) -> NDArray[Any]:
    """Return the nearest numbers of a floating-point format, rounding halves to even and saturating.

    Parameters
    ----------
    values : ndarray of float32 or float64
    form : FloatFormat
    """
    kept = np.clip(values, -form.largest, form.largest)
    # The bits of the exponent alone are the power of two below the value: a tenth of the time of np.frexp.
    whole, exponent = _EXPONENTS[kept.dtype.name]
    below = (kept.view(whole) & exponent).view(kept.dtype)
    quantum = np.maximum(below, kept.dtype.type(form.least_normal)) * kept.dtype.type(2.0**-form.mantissa)
    return np.asarray(np.rint(kept / quantum) * quantum)


_EXPONENTS = {
    "float32": (np.int32, np.int32(0x7F800000)),
    "float64": (np.int64, np.int64(0x7FF0000000000000)),
}
"""Type to the integer type of the same size, and the bits of the exponent in it."""


@dataclass(frozen=True)
class Levels:
    """The values that a tensor can take in units of its scale: those of a format, minus a zero point.

    Parameters
    ----------
    format : IntFormat or FloatFormat
    zero : ndarray
        Of a shape that broadcasts to that of the values to round; 0 for floating-point formats.
    """

    format: Format
    zero: NDArray[Any]

    @cached_property
    def _limits(self) -> tuple[Array, Array]:
        low, high = self.format.qmin - self.zero, self.format.qmax - self.zero
        return np.asarray(low, np.float32), np.asarray(high, np.float32)

    def __getitem__(self, place: Any) -> Levels:
        """Return the levels of some rows."""
        return Levels(self.format, self.zero[place])

    def nearest(self, steps: NDArray[np.floating[Any]]) -> NDArray[Any]:
        """Return the nearest levels, rounding halves to even."""
        if isinstance(self.format, FloatFormat):
            return nearest_float(steps, self.format)
        return np.asarray(np.clip(nearest(steps), *self._limits))


@dataclass(frozen=True)
class Grid:
    """Format, granularity, scale and zero point of a tensor.

    Parameters
    ----------
    format : IntFormat or FloatFormat
    granularity : PerTensor, PerAxis or PerBlock
    scale : ndarray of float32
        Of the shape given by the granularity, or a scalar.
    zero_point : int or ndarray of int
        Of the scale's shape, or a scalar; 0 for floating-point formats.
    """

    format: Format
    granularity: Granularity
    scale: Array
    zero_point: int | IntArray = 0

    def quantize(self, x: Array, dtype: str = "float32") -> NDArray[Any]:
        """Return values of the format, as QuantizeLinear does.

        Parameters
        ----------
        x : ndarray
        dtype : str
            Type of the result.
        """
        scale, zero = self.spread(x.shape)
        result = np.empty(x.shape, dtype)
        for part in slices(x):
            result[part] = self._rounded(x[part] / part_of(scale, part), part_of(zero, part))
        return result

    def _rounded(self, steps: NDArray[np.floating], zero: Array) -> NDArray[np.floating]:
        if isinstance(self.format, FloatFormat):
            return nearest_float(steps, self.format)
        return np.asarray(np.clip(np.rint(steps) + zero, self.format.qmin, self.format.qmax))

    def dequantize(self, values: NDArray[Any]) -> Array:
        """Return the real values of values of the format, as DequantizeLinear does."""
        scale, zero = self.spread(values.shape)
        result: Array = np.empty(values.shape, np.float32)
        for part in slices(values):
            result[part] = (values[part].astype(np.float32) - part_of(zero, part)) * part_of(scale, part)
        return result

    def in_container(self, x: Array) -> Values:
        """Return values of the format, as `quantize` does, in its container's type."""
        return self.quantize(x, self.format.container)

    def round(self, x: Array) -> Array:
        """Return the real values rounded to the grid."""
        return self.dequantize(self.quantize(x))

    def widened(self) -> Grid:
        """Return the grid of 16 bits on which every value of this one, of at most 8 bits, lies exactly."""
        if not isinstance(self.format, IntFormat) or self.format.bits > _FULL:
            raise ValueError(f"{self.format} does not fit into 16 bits with finer steps")
        form = IntFormat.full(2 * _FULL, signed=self.format.signed)
        zero = np.asarray(self.zero_point, np.int64) * FINER
        scale: Array = np.asarray(self.scale / np.float32(FINER), np.float32)
        return replace(self, format=form, scale=scale, zero_point=zero if zero.ndim else int(zero))

    def encode(self, values: NDArray[Any], storage: Storage) -> bytes:
        """Return the bytes of values of the format, in C order."""
        codes = self.format.codes(np.asarray(values, np.float32).reshape(-1))
        width = _width(self.format, storage)
        if width == self.format.bits and width not in (8, 16):
            bits = (codes[:, None] >> np.arange(width, dtype=np.uint16)) & 1
            return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little").tobytes()
        if isinstance(self.format, IntFormat) and self.format.signed and width > self.format.bits:
            codes = np.asarray(values).reshape(-1).astype(np.int64).astype(np.uint16)
        return codes.astype("<u1" if width == 8 else "<u2").tobytes()

    def decode(self, content: bytes, shape: tuple[int, ...], storage: Storage) -> Array:
        """Return the values of the format from their bytes."""
        width, count = _width(self.format, storage), int(np.prod(shape))
        if width == self.format.bits and width not in (8, 16):
            bits = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little")[
                : count * width
            ].reshape(count, width)
            codes = (bits.astype(np.uint16) << np.arange(width, dtype=np.uint16)).sum(axis=1, dtype=np.uint16)
        else:
            codes = np.frombuffer(content, "<u1" if width == 8 else "<u2").astype(np.uint16) & np.uint16(
                2**self.format.bits - 1
            )
        return self.format.values(codes).reshape(shape)

    def spread(self, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Return scale and zero point in shapes that broadcast to the tensor's, both as real numbers."""
        zero: Array = np.asarray(self.zero_point, np.float32)
        along = self.granularity.spread
        return np.asarray(along(self.scale, shape)), np.asarray(along(zero, shape)) if zero.ndim else zero


def _width(form: Format, storage: Storage) -> int:
    """Return the bits that a stored value takes."""
    if storage is Storage.PACKED or (storage is Storage.NATIVE and form.bits in (2, 4, 8, 16)):
        return form.bits
    return 8 if form.bits <= 8 else 16


def slices(values: NDArray[np.generic]) -> list[Any]:
    """Return slices of the first axis that cut an array into parts."""
    if values.ndim == 0 or values.size <= _PART:
        return [...]
    step = max(1, _PART * len(values) // values.size)
    return [slice(begin, begin + step) for begin in range(0, len(values), step)]


def part_of(scale: Array, part: Any) -> Array:
    """Return the scales of a part."""
    return scale[part] if np.ndim(scale) and len(scale) > 1 else scale
