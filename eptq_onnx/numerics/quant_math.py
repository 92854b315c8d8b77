"""Quantization arithmetic: scales, zero points, ranges, units. Pure numpy, no ONNX.

Everywhere ``q(x) = (clip(round(x / s) + z, qmin, qmax) - z) * s`` with half-to-even rounding, as ONNX
QuantizeLinear and DequantizeLinear compute it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.numerics.formats import IntFormat
from eptq_onnx.numerics.grid import Grid, Levels, nearest, part_of, slices
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.numerics.spec import QuantSpec
from eptq_onnx.numerics.types import Array, IntArray, Values
from eptq_onnx.parallel import ordered_map

Number = TypeVar("Number", bound=np.generic)

_TINY = np.float32(1e-30)

FEW_BITS = 6
"""Width up to which scales and integers are searched thoroughly, because rounding causes much noise."""
_SEARCH_FEW_BITS, _SEARCH_MANY_BITS = (40, 3), (12, 2)
"""Ratios tried per round, and rounds, for scales of such widths and of others."""
_OCTAVES = 6
"""Powers of two tried below the scale that clips nothing."""


# ---- channels ----------------------------------------------------------------------------------------------
def channel_sum(values: Array, axis: int | None) -> Array:
    """Sum over all axes but the channel axis; returns shape (n_channels,), or a scalar without axis."""
    if axis is None:
        return np.asarray(values.sum(dtype=np.float64), np.float32)
    others = tuple(i for i in range(values.ndim) if i != axis)
    return np.asarray(values.sum(axis=others, dtype=np.float64), np.float32)


# ---- quantizers --------------------------------------------------------------------------------------------
def folded(integers: Values, grid: Grid) -> tuple[Values, Grid]:
    """Fold the zero point into the integers, so that the zero point is 0.

    The integers then have the range of the container. Numbers of a floating-point format have no zero point.
    """
    if not np.any(grid.zero_point):
        return integers, grid
    assert isinstance(grid.format, IntFormat)
    _, zero = grid.spread(integers.shape)
    steps: IntArray = np.empty(integers.shape, grid.format.container)
    for part in slices(integers):
        steps[part] = integers[part] - part_of(zero, part)
    whole = IntFormat.full(8 * steps.itemsize, signed=grid.format.signed)
    return steps, replace(grid, format=whole, zero_point=0)


# ---- weight ranges -----------------------------------------------------------------------------------------
def weight_scales(
    weight: Array,
    spec: QuantSpec,
    importance: Array | None = None,
    damping: float = 0.1,
    points: int | None = None,
    rounds: int | None = None,
) -> Array:
    """Return scales that minimize ``sum H * (W - q(W))**2`` per channel (HMSE, paper section 3.3).

    Parameters
    ----------
    weight : ndarray
    spec : QuantSpec
        ``axis`` is the channel axis. If it allows zero points, each scale is tried with those of
        `zero_points`.
    importance : ndarray of the weight's shape, optional
        H; without it, all elements have the same weight (MSE).
    damping : float
        H is replaced by ``H + damping * mean(H)`` per tensor: with few probes, an undamped H clips weights
        that only appear insensitive.
    points, rounds : int
        Clipping ratios tried per round, and rounds of refining the search around the best ratio. By default
        they are 40 and 3 up to 6 bits, and 12 and 2 above, where the error depends little on the ratio.

    Returns
    -------
    ndarray of float32, scalar or of shape (n_channels,)
        Positive; 1 for a channel of zeros.
    """
    rows, h = _rows_and_importance(weight, spec, importance, damping)
    parts = slices(rows)
    usual = _SEARCH_FEW_BITS if spec.bits <= FEW_BITS else _SEARCH_MANY_BITS
    tried = points or usual[0], rounds or usual[1]
    found = ordered_map(lambda part: _row_scales(rows[part].astype(np.float32), h[part], spec, *tried), parts)
    return spec.granularity.scales_of(np.concatenate(list(found)), weight.shape)


def zero_points(
    weight: Array, scale: Array, spec: QuantSpec, importance: Array | None = None, damping: float = 0.1
) -> IntArray:
    """Return the zero point of each scale that centres the grid on the channel's extremes.

    Of the two nearest integers, the one with the smaller error is taken.

    Parameters
    ----------
    weight : ndarray
    scale : ndarray of float32, scalar or of shape (n_channels,)
    spec : QuantSpec
    importance, damping
        As in `weight_scales`.

    Returns
    -------
    ndarray of int32, of the scale's shape
        Within ``spec.zero_points``.
    """
    if spec.symmetric:
        return np.zeros(np.shape(scale), np.int32)
    rows, h = _rows_and_importance(weight, spec, importance, damping)
    scales = spec.granularity.flat(np.asarray(scale))
    found = []
    for part in slices(rows):
        own: Array = rows[part].astype(np.float32)
        _, zero = _best_grid(own, h[part], scales[part], spec)
        found.append(zero)
    return spec.granularity.scales_of(np.concatenate(found), weight.shape).astype(np.int32)


def _rows_and_importance(
    weight: Array, spec: QuantSpec, importance: Array | None, damping: float
) -> tuple[NDArray[np.floating], Array]:
    """Return one row per channel and the weights of its elements, or a single column if all are equal."""
    rows = spec.granularity.rows(weight)
    h: Array = np.ones((len(rows), 1), np.float32)
    if importance is not None and importance.any():
        h = spec.granularity.rows(importance).astype(np.float32)
        h = h / np.float32(h.mean(dtype=np.float64)) + np.float32(damping)
    return rows, h


def _row_scales(rows: Array, h: Array, spec: QuantSpec, points: int, rounds: int) -> Array:
    """Return the best scale of each row; importance is given per element or per row."""
    largest = max_scales(rows, spec)
    if spec.scales is ScaleRule.POWER_OF_TWO:
        return _row_powers(rows, h, spec, spec.scales.above(largest))
    low, high = np.full(len(rows), 0.2, np.float32), np.full(len(rows), 1.1, np.float32)
    best = np.ones(len(rows), np.float32)
    best_error, _ = _best_grid(rows, h, largest, spec)
    for _ in range(rounds):
        for fraction in np.linspace(0, 1, points, dtype=np.float32):
            ratio = low + (high - low) * fraction
            error, _ = _best_grid(rows, h, largest * ratio, spec)
            better = error < best_error
            best_error = np.where(better, error, best_error)
            best = np.where(better, ratio, best)
        width = (high - low) / np.float32(points - 1)
        low, high = np.maximum(best - width, 0.02), best + width
    return np.where(rows.any(axis=1), largest * best, np.float32(1)).astype(np.float32)


def _row_powers(rows: Array, h: Array, spec: QuantSpec, largest: Array) -> Array:
    """Return the best power of two of each row, starting from the one that clips nothing."""
    best, best_error = largest, np.full(len(rows), np.inf, np.float32)
    for octave in range(_OCTAVES + 1):
        scale = np.ldexp(largest, -octave)
        error, _ = _best_grid(rows, h, scale, spec)
        better = error < best_error
        best, best_error = np.where(better, scale, best), np.where(better, error, best_error)
    return np.where(rows.any(axis=1), best, np.float32(1)).astype(np.float32)


def max_scales(rows: NDArray[np.floating], spec: QuantSpec) -> Array:
    """Return the smallest scale of each row that clips nothing; tiny but positive for a row of zeros."""
    least, most = spec.zero_points
    up = rows.max(axis=1, initial=0) / (spec.qmax - least)
    down = rows.min(axis=1, initial=0) / (spec.qmin - most) if spec.qmin < most else np.zeros(len(rows))
    reach = np.maximum(up, down)
    if not spec.symmetric and rows.shape[1]:
        reach = np.maximum(reach, np.ptp(rows, axis=1) / (spec.qmax - spec.qmin))
    result: Array = np.maximum(reach, _TINY).astype(np.float32)
    return result


def _best_grid(rows: Array, h: Array, scales: Array, spec: QuantSpec) -> tuple[Array, Array]:
    """Return the weighted squared error of each row on its best grid, and that grid's zero point."""
    steps = rows / scales[:, None]
    squares = np.square(scales, dtype=None if unit(scales) == 1 else np.float64)
    best: Array = np.full(len(rows), np.inf, np.float32)
    chosen: Array = np.zeros(len(rows), np.float32)
    for zero in _grids(rows, scales, spec):
        error = Levels(spec.format, zero[:, None]).nearest(steps)
        error -= steps
        error *= error
        error *= h
        total = error.sum(axis=1) * squares
        better = total < best
        best, chosen = np.where(better, total, best), np.where(better, zero, chosen)
    return best, chosen


def _grids(rows: Array, scales: Array, spec: QuantSpec) -> list[Array]:
    """Return the zero points to try for each row."""
    if spec.symmetric or not rows.shape[1]:
        return [np.zeros(len(rows), np.float32)]
    middle = (spec.qmin + spec.qmax) / 2 - (rows.max(axis=1) + rows.min(axis=1)) / (2 * scales)
    return [np.clip(side(middle), *spec.zero_points).astype(np.float32) for side in (np.floor, np.ceil)]


# ---- units for values whose squares float32 does not hold --------------------------------------------------
_LEAST_SQUARED, _MOST_SQUARED = 1e-15, 1e15
"""Magnitudes between which float32 holds squares and sums of many squares."""


_LEAST_SURE, _MOST_SURE = 1e-6, 1e6
"""Magnitudes between which that is so for products of two values, too."""


def finite_extremes(values: NDArray[np.floating]) -> tuple[float, float]:
    """Return the smallest and largest finite value; inf and -inf if there is none."""
    if not values.size:
        return float("inf"), float("-inf")
    low, high = float(values.min()), float(values.max())
    if np.isfinite(low) and np.isfinite(high):
        return low, high
    finite = np.isfinite(values)
    return float(values.min(initial=np.inf, where=finite)), float(values.max(initial=-np.inf, where=finite))


def all_finite(values: NDArray[np.floating]) -> bool:
    """Return True if no value is NaN or infinite."""
    # The sum takes one reading, and is finite if all values are, unless it overflows.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(values.sum()) or np.isfinite(values).all())


def unit(*arrays: NDArray[np.floating]) -> np.float32:
    """Return a power of two that brings extreme values near 1, so that float32 holds their squares.

    It is 1 if float32 holds the squares anyway.
    """
    largest = max((max(-low, high) for low, high in map(finite_extremes, arrays) if low <= high), default=0.0)
    if largest == 0 or _LEAST_SQUARED < largest < _MOST_SQUARED:
        return np.float32(1)
    return np.float32(2.0 ** np.clip(np.floor(np.log2(largest)), -126, 126))


def layer_units(
    inputs: Iterable[NDArray[np.floating]], weight: NDArray[np.floating]
) -> tuple[np.float32, np.float32]:
    """Return units of a layer's input and weight in which float32 holds their squares and their products'.

    Both are 1 if float32 holds the squares anyway.
    """
    inputs = list(inputs)
    if all(map(_surely_holds_squares, (*inputs, weight))):
        return np.float32(1), np.float32(1)
    reaches = [
        max((max(-low, high) for low, high in map(finite_extremes, part) if low <= high), default=0.0)
        for part in (inputs, [weight])
    ]
    sizes = [r for r in (*reaches, reaches[0] * reaches[1]) if r]
    if all(_LEAST_SQUARED < size < _MOST_SQUARED for size in sizes):
        return np.float32(1), np.float32(1)
    first, second = (
        np.float32(2.0 ** np.clip(np.floor(np.log2(r)), -126, 126)) if r else np.float32(1) for r in reaches
    )
    return first, second


def _surely_holds_squares(values: NDArray[np.floating]) -> bool:
    """Return True if the largest magnitude is far from where float32 no longer holds squares and products.

    The sum of squares bounds it from both sides, in a single reading.
    """
    flat = values.reshape(-1)
    if not flat.size:
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        power = float(np.dot(flat, flat))
    return _LEAST_SURE**2 * flat.size < power < _MOST_SURE**2


def square_sum(values: NDArray[np.floating]) -> float:
    """Return the sum of the squares of finite values, in float64 if float32 would overflow."""
    found = float(np.dot(values, values)) if unit(values) == 1 else float("inf")
    return found if np.isfinite(found) else float(np.square(values, dtype=np.float64).sum())


# ---- activation ranges -------------------------------------------------------------------------------------
def stride(size: int, limit: int) -> int:
    """Return a step that picks about ``limit`` of ``size`` values and is coprime to the usual image sizes."""
    step = max(1, size // limit)
    while step > 1 and any(step % p == 0 for p in (2, 3, 5, 7)):
        step += 1
    return step


def activation_grid(
    low: float, high: float, spec: QuantSpec, bounds: tuple[float, float] | None = None
) -> Grid:
    """Return the grid that covers ``[low, high]`` and 0.

    Parameters
    ----------
    low, high : float
        Range to represent.
    spec : QuantSpec
    bounds : tuple of float, optional
        Limits that no representable value may exceed, so that the Relu or Clip in front of the quantizer can
        be dropped; see `inside_bounds`.

    Returns
    -------
    Grid
        With a scalar scale; 0 is exactly representable.
    """
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    high = max(high, low + spec.least_range)
    if spec.symmetric:
        reach = max(high / spec.qmax, low / spec.qmin if spec.qmin < 0 else 0.0)
        grid = spec.grid(_reaching(reach, spec))
    else:
        scale = (high - low) / (spec.qmax - spec.qmin)
        scale = scale if scale > 1e-30 else 1.0
        if spec.scales is not ScaleRule.ANY:
            scale = float(_reaching(scale, spec))
        zero = int(np.clip(nearest(spec.qmin - low / scale), spec.qmin, spec.qmax))
        grid = spec.grid(np.asarray(scale, np.float32), zero)
    return grid if bounds is None else inside_bounds(grid, spec, bounds)


def prescribed_grid(reach: tuple[float, float], spec: QuantSpec) -> Grid:
    """Return the grid that divides a real range evenly among all values of a format of integers.

    Parameters
    ----------
    reach : tuple of float
    spec : QuantSpec
    """
    low, high = reach
    if spec.symmetric:
        low, high = -max(-low, high), max(-low, high)
    scale = (high - low) / (spec.qmax - spec.qmin + 1)
    zero = 0 if spec.symmetric else int(np.clip(nearest(spec.qmin - low / scale), spec.qmin, spec.qmax))
    return spec.grid(np.asarray(scale, np.float32), zero)


def _reaching(scale: float, spec: QuantSpec) -> Array:
    """Return the smallest allowed scale that is at least ``scale``; 1 if that is next to nothing."""
    return spec.scales.above(np.asarray(scale if scale > 1e-30 else 1.0, np.float32))


def keeps_bounds(spec: QuantSpec, bounds: tuple[float, float]) -> bool:
    """Return True if a quantizer can replace a Relu or Clip with these limits in front of it.

    It cannot if its zero point is always 0. If its scales are powers of two, it can only keep limits of 0.
    """
    low, high = bounds
    ends = all(end == 0 or np.isinf(end) for end in bounds)
    return not spec.symmetric and low <= 0 <= high and low < high and (ends or spec.scales is ScaleRule.ANY)


def inside_bounds(grid: Grid, spec: QuantSpec, bounds: tuple[float, float]) -> Grid:
    """Shrink the scale until every representable value, in float32, lies within ``bounds``.

    The quantizer then replaces a Relu or Clip with these limits in front of it, if it can (`keeps_bounds`).
    """
    low, high = bounds
    if not keeps_bounds(spec, bounds):
        return grid
    zero = spec.qmin if low == 0 else spec.qmax if high == 0 else grid.zero_point
    reach_low, reach_high = spec.qmin - zero, spec.qmax - zero
    scale = np.float32(grid.scale)
    if np.isfinite(high) and reach_high > 0:
        scale = min(scale, np.float32(high / reach_high))
    if np.isfinite(low) and low < 0 and reach_low < 0:
        scale = min(scale, np.float32(low / reach_low))
    while np.isfinite(high) and np.float32(reach_high) * scale > np.float32(high):
        scale = np.nextafter(scale, np.float32(0))
    while np.isfinite(low) and np.float32(reach_low) * scale < np.float32(low):
        scale = np.nextafter(scale, np.float32(0))
    return replace(grid, scale=np.asarray(scale, np.float32), zero_point=zero)


def continuous(target: Array, values: Values, grid: Grid) -> Array:
    """Return a continuous copy of rounded weights: positions among the values of the format.

    Each element lies on the side of ``target``, but safely rounds to ``values``.
    """
    scale, zero = grid.spread(target.shape)
    steps = grid.format.position(np.asarray(target / scale + zero))
    near = grid.format.position(values.astype(np.float64))
    return np.asarray(near + np.clip(steps - near, -0.45, 0.45), np.float32)


# ---- measures ----------------------------------------------------------------------------------------------
def sqnr_db(signal_power: float, noise_power: float) -> float:
    """Return the signal-to-quantization-noise ratio in dB; infinite without noise."""
    if noise_power <= 0:
        return float("inf")
    return float(10 * np.log10(max(signal_power, 1e-45) / noise_power))
