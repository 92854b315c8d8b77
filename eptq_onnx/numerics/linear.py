"""Layers as matrix products: rows of inputs times rows of weights. Pure numpy, no ONNX.

A layer computes, for each of its groups, ``y = x Wᵀ + b`` with x a row of inputs (a patch, for convolutions).
The forms here extract such rows from an input tensor, and turn a weight tensor into rows and back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.numerics.types import Array


def _places(room: int, stride: int) -> int:
    """Return how many times a kernel with that room to move fits; onnxruntime divides towards zero."""
    return abs(room) // abs(stride) * (1 if (room < 0) == (stride < 0) else -1) + 1


class WeightForm(Protocol):
    """How a weight is laid out as rows, one for each output."""

    def weight_rows(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Return the weight as an array of shape (n_groups, n_outputs, n_terms)."""
        ...

    def weight_from_rows(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Inverse of `weight_rows`."""
        ...


class LinearForm(WeightForm, Protocol):
    """How a layer is laid out as a matrix product."""

    @property
    def taps(self) -> int:
        """Number of consecutive terms that belong to each input channel."""
        ...

    def positions(self, x_shape: Sequence[int]) -> int:
        """Return the number of rows of an input of this shape."""
        ...

    def input_rows(self, x: Array, chosen: NDArray[np.int64]) -> Array:
        """Return the rows at the chosen positions (ascending), of shape (n_groups, len(chosen), n_terms)."""
        ...


@dataclass(frozen=True)
class OutputsApart:
    """A weight whose outputs are treated as separate groups.

    Parameters
    ----------
    form : WeightForm
    outputs : int
        Outputs in each group of ``form``.
    """

    form: WeightForm
    outputs: int

    def weight_rows(self, weight: NDArray[Any]) -> NDArray[Any]:
        """See `WeightForm`."""
        rows = self.form.weight_rows(weight)
        return rows.reshape(-1, 1, rows.shape[2])

    def weight_from_rows(self, rows: NDArray[Any]) -> NDArray[Any]:
        """See `WeightForm`."""
        return self.form.weight_from_rows(rows.reshape(-1, self.outputs, rows.shape[2]))


@dataclass(frozen=True)
class Rows:
    """A weight that is laid out as rows already, of shape (n_groups, n_outputs, n_terms)."""

    def weight_rows(self, weight: NDArray[Any]) -> NDArray[Any]:
        """See `WeightForm`."""
        return weight

    def weight_from_rows(self, rows: NDArray[Any]) -> NDArray[Any]:
        """See `WeightForm`."""
        return rows


def row_shape(form: WeightForm, shape: Sequence[int]) -> tuple[int, int, int]:
    """Return the numbers of groups, outputs and terms of a weight of this shape."""
    groups, outputs, terms = form.weight_rows(np.broadcast_to(np.float32(0), tuple(shape))).shape
    return groups, outputs, terms


def scale_places(form: WeightForm, shape: Sequence[int], axis: int | None) -> NDArray[np.int64]:
    """Return the index of each row's scale, of shape (n_groups, n_outputs).

    Parameters
    ----------
    form : LinearForm
        Layout of the weight.
    shape : sequence of int
        Shape of the weight.
    axis : int or None
        Axis with one scale per index; None for a single scale.
    """
    index = np.zeros(shape, np.int64)
    if axis is not None:
        index += np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return form.weight_rows(index)[:, :, 0]


@dataclass(frozen=True)
class MatrixForm:
    """A matrix product with a constant right-hand side (ONNX Gemm, MatMul).

    Parameters
    ----------
    transposed : bool
        True if the weight is stored as (n_outputs, n_terms).
    gain : float
        Factor of the product (alpha of Gemm).
    """

    transposed: bool = False
    gain: float = 1.0

    @property
    def taps(self) -> int:
        """See `LinearForm`."""
        return 1

    def weight_rows(self, weight: NDArray[Any]) -> NDArray[Any]:
        """See `LinearForm`."""
        return (weight if self.transposed else weight.T)[None]

    def weight_from_rows(self, rows: NDArray[Any]) -> NDArray[Any]:
        """See `LinearForm`."""
        return np.ascontiguousarray(rows[0] if self.transposed else rows[0].T)

    def positions(self, x_shape: Sequence[int]) -> int:
        """See `LinearForm`."""
        return int(np.prod(x_shape[:-1]))

    def input_rows(self, x: Array, chosen: NDArray[np.int64]) -> Array:
        """See `LinearForm`."""
        rows: Array = x.reshape(-1, x.shape[-1])[chosen]
        if self.gain != 1:
            rows *= np.float32(self.gain)
        return rows[None]


@dataclass(frozen=True)
class ConvForm:
    """A convolution of any rank (ONNX Conv and ConvTranspose).

    ConvTranspose is treated as the Conv over its input with zeros inserted.

    Parameters
    ----------
    kernel, strides, dilations : tuple of int
        One number per spatial axis.
    pads : tuple of int or None
        Begins, then ends; None with ``auto_pad``.
    auto_pad : str
        SAME_UPPER, SAME_LOWER, VALID or NOTSET.
    group : int
    transposed : bool
        ConvTranspose: the weight is (C, M / group, *kernel), and ``pads`` crop the output.
    output_padding : tuple of int
        Used by ConvTranspose.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None
    auto_pad: str = "NOTSET"
    group: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def taps(self) -> int:
        """See `LinearForm`."""
        return math.prod(self.kernel)

    def weight_rows(self, weight: NDArray[Any]) -> NDArray[Any]:
        """See `LinearForm`."""
        g = self.group
        if not self.transposed:
            return weight.reshape(g, weight.shape[0] // g, -1)
        flipped = np.flip(weight, axis=tuple(range(2, weight.ndim)))
        parted = flipped.reshape(g, weight.shape[0] // g, *weight.shape[1:])
        return np.swapaxes(parted, 1, 2).reshape(g, weight.shape[1], -1)

    def weight_from_rows(self, rows: NDArray[Any]) -> NDArray[Any]:
        """See `LinearForm`."""
        g, outputs = rows.shape[:2]
        parted = rows.reshape(g, outputs, -1, *self.kernel)
        if not self.transposed:
            return np.ascontiguousarray(parted.reshape(g * outputs, -1, *self.kernel))
        swapped = np.swapaxes(parted, 1, 2).reshape(-1, outputs, *self.kernel)
        return np.ascontiguousarray(np.flip(swapped, axis=tuple(range(2, swapped.ndim))))

    def positions(self, x_shape: Sequence[int]) -> int:
        """See `LinearForm`."""
        return int(x_shape[0]) * int(np.prod(self._extents(x_shape)))

    def input_rows(self, x: Array, chosen: NDArray[np.int64]) -> Array:
        """See `LinearForm`."""
        extents = self._extents(x.shape)
        if self.transposed:
            x = self._spread(x)
        begins, _ = self._pads(x.shape)
        strides = (1,) * len(self.kernel) if self.transposed else self.strides
        sizes = x.shape[2:]
        sample, *places = np.unravel_index(chosen, (len(x), *extents))
        # Where each element of each patch lies in a channel; padding is read as 0, without a padded copy.
        index: NDArray[np.int64] = np.reshape(sample * math.prod(x.shape[1:]), (1, -1))
        outside: NDArray[np.bool_] = np.zeros((1, len(chosen)), bool)
        for axis, n in enumerate(sizes):
            taps = np.arange(self.kernel[axis])[:, None] * self.dilations[axis] - begins[axis]
            own = taps + places[axis] * strides[axis]
            inside = np.clip(own, 0, n - 1)
            shape, taken = (len(index), len(own), len(chosen)), (len(index) * len(own), len(chosen))
            pitch = math.prod(sizes[axis + 1 :])
            index = np.broadcast_to(index[:, None] + inside * pitch, shape).reshape(taken)
            outside = np.broadcast_to(outside[:, None] | (own != inside), shape).reshape(taken)
        # Channel by channel, so that memory is read in order; from each on, places are the same.
        flat, channel = np.ascontiguousarray(x).reshape(-1), math.prod(sizes)
        columns = np.empty((x.shape[1], len(index), len(chosen)), x.dtype)
        for c, column in enumerate(columns):
            # All places exist; this mode alone writes to the column directly.
            np.take(flat[c * channel :], index, out=column, mode="clip")
        if outside.any():
            columns[:, outside] = 0
        terms = columns.shape[0] * columns.shape[1] // self.group
        return columns.reshape(self.group, terms, len(chosen)).swapaxes(1, 2)

    def _spread(self, x: Array) -> Array:
        """Return the input with stride - 1 zeros between its elements."""
        extents = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], self.strides, strict=True)]
        result = np.zeros((*x.shape[:2], *extents), x.dtype)
        result[(slice(None), slice(None), *(slice(None, None, s) for s in self.strides))] = x
        return result

    def _extents(self, x_shape: Sequence[int]) -> list[int]:
        """Return the spatial extents of the output."""
        spatial = list(x_shape[2:])
        if self.transposed:
            spatial = [(n - 1) * s + 1 for n, s in zip(spatial, self.strides, strict=True)]
        begins, ends = self._pads((*x_shape[:2], *spatial))
        strides = (1,) * len(spatial) if self.transposed else self.strides
        terms = zip(spatial, begins, ends, self.kernel, self.dilations, strides, strict=True)
        return [_places(n + a + e - (k - 1) * d - 1, s) for n, a, e, k, d, s in terms]

    def _pads(self, shape: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the zeros before and after each spatial axis of the (spread) input.

        They are negative for a ConvTranspose that crops more than the kernel reaches.
        """
        rank = len(self.kernel)
        reach = [(k - 1) * d for k, d in zip(self.kernel, self.dilations, strict=True)]
        if self.transposed:
            pads = self.pads or (0,) * (2 * rank)
            extra = self.output_padding or (0,) * rank
            return [r - p for r, p in zip(reach, pads[:rank], strict=True)], [
                r - p + o for r, p, o in zip(reach, pads[rank:], extra, strict=True)
            ]
        if self.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            totals = [
                max(0, (-(-n // s) - 1) * s + r + 1 - n)
                for n, s, r in zip(shape[2:], self.strides, reach, strict=True)
            ]
            small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
            return (small, large) if self.auto_pad == "SAME_UPPER" else (large, small)
        pads = self.pads or (0,) * (2 * rank)
        return list(pads[:rank]), list(pads[rank:])
