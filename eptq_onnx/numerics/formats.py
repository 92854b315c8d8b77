"""Number formats, granularities of scales, and storage layouts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.numerics.types import Array, Float64, IntArray, Values

Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True)
class IntFormat:
    """Integers from ``qmin`` to ``qmax``.

    Parameters
    ----------
    bits : int
        Width of a stored value, 2 to 16.
    signed : bool
    qmin, qmax : int
        Range of values, which may be narrower than the width allows.
    """

    bits: int
    signed: bool
    qmin: int
    qmax: int

    def __post_init__(self) -> None:
        low, high = (
            (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if self.signed else (0, 2**self.bits - 1)
        )
        if not 2 <= self.bits <= 16 or not low <= self.qmin < self.qmax <= high:
            raise ValueError(f"{self.bits} bits do not hold {self.qmin} to {self.qmax}")

    @classmethod
    def full(cls, bits: int, *, signed: bool) -> IntFormat:
        """Return the format with the whole range of a width."""
        return (
            cls(bits, signed, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            if signed
            else cls(bits, signed, 0, 2**bits - 1)
        )

    @property
    def largest(self) -> float:
        """Return the largest magnitude that both signs can represent."""
        return float(self.qmax if not self.signed else min(-self.qmin, self.qmax))

    @property
    def container(self) -> str:
        """Return the smallest integer type of numpy that holds the values."""
        return f"{'' if self.signed else 'u'}int{8 if self.bits <= 8 else 16}"

    @property
    def type_name(self) -> str:
        """Return the name of the ONNX type that holds the values."""
        return self.container

    @property
    def has_equal_steps(self) -> bool:
        """Return True: neighbouring values differ by 1 everywhere."""
        return True

    @property
    def narrower_than_container(self) -> bool:
        """Return True if the container can hold integers outside ``[qmin, qmax]``."""
        info = np.iinfo(self.container)
        return bool(self.qmin > info.min or self.qmax < info.max)

    def position(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the positions of real values among the format's: the values themselves."""
        return values

    def at(self, positions: Array) -> Array:
        """Return the values at positions, clipped to the range."""
        return np.asarray(np.clip(positions, self.qmin, self.qmax))

    def gap(self, positions: Array) -> Array:
        """Return the distance between the format's values around each position: 1."""
        return np.ones((), np.float32)

    def is_inside(self, positions: Array) -> NDArray[np.bool_]:
        """Return True for positions within the range."""
        return np.asarray((positions >= self.qmin) & (positions <= self.qmax))

    def raw(self, values: Values) -> IntArray:
        """Return values of the format as `type_name` stores them."""
        return np.asarray(values, self.container)

    def codes(self, values: Array) -> NDArray[np.uint16]:
        """Return the bit patterns of values; negative values are in two's complement."""
        return np.asarray(values.astype(np.int64) & (2**self.bits - 1), np.uint16)

    def values(self, codes: NDArray[np.uint16]) -> Array:
        """Return the values of bit patterns."""
        whole = codes.astype(np.int64)
        return (whole - (whole >= 2 ** (self.bits - 1)) * 2**self.bits if self.signed else whole).astype(
            np.float32
        )


@dataclass(frozen=True)
class FloatFormat:
    """Binary floating-point numbers with a sign, as ONNX defines them.

    float8e4m3fn is (4, 3, finite), float8e5m2 is (5, 2).

    Parameters
    ----------
    exponent, mantissa : int
        Bits of each; the bias is ``2 ** (exponent - 1) - 1``.
    finite : bool
        True if there are no infinities: the largest exponent holds numbers as well, and only the pattern of
        all ones is NaN.

    Notes
    -----
    The *position* of a number counts the format's numbers from 0 up to it, negative below 0; between two
    neighbours it is linear. So a number that rounds up or down moves to the next position, however far apart
    the two are.

    References
    ----------
    Micikevicius et al. 2022, "FP8 formats for deep learning"; ONNX technical note "Float stored in 8 bits".
    """

    exponent: int
    mantissa: int
    finite: bool = False

    @property
    def bits(self) -> int:
        """Width of a stored value."""
        return 1 + self.exponent + self.mantissa

    @property
    def container(self) -> str:
        """Return the type of numpy that holds the values in memory; files hold bit patterns."""
        return "float32"

    @property
    def type_name(self) -> str:
        """Return the name of the ONNX type."""
        return f"float{self.bits}e{self.exponent}m{self.mantissa}{'fn' if self.finite else ''}"

    @property
    def has_equal_steps(self) -> bool:
        """Return False: neighbours are the further apart, the larger they are."""
        return False

    @property
    def narrower_than_container(self) -> bool:
        """Return False: QuantizeLinear saturates at the largest number."""
        return False

    @property
    def qmin(self) -> int:
        """Return the smallest number."""
        return -self.qmax

    @property
    def qmax(self) -> int:
        """Return the largest number."""
        return int(self.largest)

    @property
    def _bias(self) -> int:
        return int(2 ** (self.exponent - 1) - 1)

    @property
    def largest(self) -> float:
        """Return the largest finite number."""
        top = 2**self.exponent - (1 if self.finite else 2) - self._bias
        fraction = 2 - (2 if self.finite else 1) * 2.0**-self.mantissa
        return math.ldexp(fraction, top)

    @property
    def least_normal(self) -> float:
        """Return the smallest positive number with all bits of the mantissa."""
        return math.ldexp(1, 1 - self._bias)

    def exponents(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the exponent of each value, at least that of the smallest normal number."""
        _, above = np.frexp(np.where(values == 0, self.least_normal, np.abs(values)))
        return np.asarray(np.maximum(above.astype(np.int64) - 1, 1 - self._bias))

    def position(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the positions of real values among the format's; see the notes above."""
        exact = np.abs(values.astype(np.float64))
        exponents = self.exponents(exact)
        octaves = exponents - (1 - self._bias)
        found = np.ldexp(exact, self.mantissa - exponents) + octaves * 2**self.mantissa
        return np.asarray(np.copysign(found, values), np.float32)

    def at(self, positions: Array) -> Array:
        """Return the values at positions, clipped to the range; inverse of `position`."""
        exact = np.minimum(np.abs(positions.astype(np.float64)), self._last)
        octaves = self._octaves(exact)
        found = (exact - octaves * 2.0**self.mantissa) * self._smallest * np.exp2(octaves)
        return np.asarray(np.copysign(found, positions), np.float32)

    def gap(self, positions: Array) -> Array:
        """Return the distance between the format's values around each position."""
        exact = np.minimum(np.abs(positions.astype(np.float64)), self._last)
        return np.asarray(self._smallest * np.exp2(self._octaves(exact)), np.float32)

    def is_inside(self, positions: Array) -> NDArray[np.bool_]:
        """Return True for positions within the range."""
        return np.asarray(np.abs(positions) <= self._last)

    def _octaves(self, positions: Float64) -> Float64:
        """Return by how many powers of two the numbers at positions are above the smallest normal ones."""
        return np.asarray(np.maximum(np.floor(positions / 2**self.mantissa) - 1, 0), np.float64)

    @property
    def _last(self) -> float:
        """Return the position of the largest number."""
        return float(self.position(np.array(self.largest, np.float32)))

    @property
    def _smallest(self) -> float:
        """Return the smallest positive number."""
        return math.ldexp(1, 1 - self._bias - self.mantissa)

    def raw(self, values: Values) -> IntArray:
        """Return values of the format as `type_name` stores them: their bit patterns."""
        codes = self.codes(np.asarray(values, np.float32))
        return np.asarray(codes, np.uint8 if self.bits <= 8 else np.uint16)

    def codes(self, values: Array) -> NDArray[np.uint16]:
        """Return the bit patterns of values of the format."""
        exact = np.abs(values.astype(np.float64))
        exponents = self.exponents(exact)
        steps = np.ldexp(exact, self.mantissa - exponents).astype(np.int64)
        # Subnormal numbers have the exponent field 0.
        field = np.where(steps >= 2**self.mantissa, exponents + self._bias, 0)
        pattern = (field << self.mantissa) + steps % 2**self.mantissa
        return np.asarray(pattern + (np.signbit(values).astype(np.int64) << (self.bits - 1)), np.uint16)

    def values(self, codes: NDArray[np.uint16]) -> Array:
        """Return the values of bit patterns."""
        whole = codes.astype(np.int64)
        field, rest = (whole >> self.mantissa) & (2**self.exponent - 1), whole & (2**self.mantissa - 1)
        steps = np.where(field > 0, rest + 2**self.mantissa, rest)
        magnitude = np.ldexp(steps.astype(np.float64), np.maximum(field, 1) - self._bias - self.mantissa)
        top = field == 2**self.exponent - 1
        if self.finite:
            magnitude[top & (rest == 2**self.mantissa - 1)] = np.nan
        else:
            magnitude[top] = np.where(rest[top] == 0, np.inf, np.nan)
        return np.asarray(np.where(whole >> (self.bits - 1), -1, 1) * magnitude, np.float32)


Format: TypeAlias = IntFormat | FloatFormat
E4M3, E5M2 = FloatFormat(4, 3, finite=True), FloatFormat(5, 2)
FLOATS = {form.type_name: form for form in (E4M3, E5M2)}
"""ONNX type to the floating-point format that activations and weights may have."""


def along_axis(values: NDArray[Number], axis: int | None, rank: int) -> NDArray[Number]:
    """Reshape per-channel values to broadcast along ``axis`` of a tensor of rank ``rank``.

    Parameters
    ----------
    values : ndarray, scalar or of shape (n_channels,)
    axis : int or None
    rank : int

    Returns
    -------
    ndarray
        ``values`` itself if ``axis`` is None, else of shape (1, ..., n_channels, ..., 1).
    """
    if axis is None:
        return values
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])


@dataclass(frozen=True)
class PerTensor:
    """One scale, of shape () for any tensor."""

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a tensor's scale."""
        return ()

    def spread(self, scale: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.generic]:
        """Return the scale in a shape that broadcasts to the tensor's."""
        return scale

    def rows(self, values: NDArray[Number]) -> NDArray[Number]:
        """Return a tensor as one row for each scale: a single one."""
        return values.reshape(1, -1)

    def scales_of(self, rows: NDArray[Number], shape: tuple[int, ...]) -> NDArray[Number]:
        """Return one number for each row in the scale's shape."""
        return np.asarray(rows[0])

    def flat(self, scales: NDArray[Number]) -> NDArray[Number]:
        """Return scales in the order of `rows`; inverse of `scales_of`."""
        return scales.reshape(-1)


@dataclass(frozen=True)
class PerAxis:
    """One scale for each index of an axis: of shape (6,) for a tensor of shape (4, 6, 3) and axis 1."""

    axis: int

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a tensor's scale."""
        return (shape[self.axis],)

    def spread(self, scale: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.generic]:
        """Return the scale in a shape that broadcasts to the tensor's."""
        return along_axis(scale, self.axis % len(shape), len(shape)) if scale.ndim else scale

    def rows(self, values: NDArray[Number]) -> NDArray[Number]:
        """Return a tensor as one row for each index of the axis."""
        return np.moveaxis(values, self.axis, 0).reshape(values.shape[self.axis], -1)

    def scales_of(self, rows: NDArray[Number], shape: tuple[int, ...]) -> NDArray[Number]:
        """Return one number for each row in the scale's shape."""
        return rows

    def flat(self, scales: NDArray[Number]) -> NDArray[Number]:
        """Return scales in the order of `rows`; inverse of `scales_of`."""
        return scales.reshape(-1)


@dataclass(frozen=True)
class PerBlock:
    """One scale for each block of ``size`` consecutive values along an axis.

    It has shape (4, 3, 3) for a tensor of shape (4, 6, 3), axis 1 and size 2. The last block is shorter where
    the size does not divide the axis (ONNX QuantizeLinear, opset 21).
    """

    axis: int
    size: int

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a tensor's scale."""
        axis = self.axis % len(shape)
        return tuple(-(-n // self.size) if i == axis else n for i, n in enumerate(shape))

    def spread(self, scale: NDArray[np.generic], shape: tuple[int, ...]) -> NDArray[np.generic]:
        """Return the scale in a shape that broadcasts to the tensor's."""
        if not scale.ndim:
            return scale
        axis = self.axis % len(shape)
        return np.repeat(scale, self.size, axis=axis).take(np.arange(shape[axis]), axis=axis)

    def rows(self, values: NDArray[Number]) -> NDArray[Number]:
        """Return a tensor as one row for each block; short blocks are padded with zeros."""
        last = np.moveaxis(values, self.axis, -1)
        left = -last.shape[-1] % self.size
        if left:
            last = np.pad(last, [(0, 0)] * (last.ndim - 1) + [(0, left)])
        return last.reshape(-1, self.size)

    def scales_of(self, rows: NDArray[Number], shape: tuple[int, ...]) -> NDArray[Number]:
        """Return one number for each row in the scale's shape."""
        sizes = list(self.scale_shape(shape))
        sizes.append(sizes.pop(self.axis % len(shape)))
        return np.ascontiguousarray(np.moveaxis(rows.reshape(sizes), -1, self.axis))

    def flat(self, scales: NDArray[Number]) -> NDArray[Number]:
        """Return scales in the order of `rows`; inverse of `scales_of`."""
        return np.moveaxis(scales, self.axis, -1).reshape(-1)


Granularity: TypeAlias = PerTensor | PerAxis | PerBlock


class Storage(str, Enum):
    """How stored values are laid out in memory."""

    NATIVE = "native"
    """The ONNX type of that width: 2 and 4 bits packed, first value in the low bits; others whole bytes."""
    PACKED = "packed"
    """Bit patterns back to back, from the low bits of each byte, whatever the width."""
    CONTAINER = "container"
    """In an integer type of 8 or 16 bits."""
