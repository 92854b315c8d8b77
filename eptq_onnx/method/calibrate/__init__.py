"""Choose activation ranges in one streaming pass (paper section 3.3; AdaRound-style MSE search).

Every tensor keeps a histogram of fixed size whose range doubles when a value falls outside, so memory does
not depend on the number of samples. Minima and maxima are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx.config import ActivationRange, Config
from eptq_onnx.data.samples import Samples
from eptq_onnx.execute.pieces import function_of
from eptq_onnx.graph import edit
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.calibrate.constants import constant_grids
from eptq_onnx.method.calibrate.seen import (
    VALUES_PER_SAMPLE,
    Finite,
    Reader,
    spread_values,
    values_of_a_sample,
    watch,
)
from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.grid import Grid, Levels
from eptq_onnx.numerics.sums import PowerSum
from eptq_onnx.numerics.types import Array
from eptq_onnx.ops import output_parts
from eptq_onnx.records import (
    ActivationQuantizer,
    Calibration,
    Plan,
)

A_READING = 0.15
"""Cost of a value that is read for its tensor's extremes, relative to one that is counted."""
_BINS = 8192
"""Bins of a histogram."""
_GRID = 32
"""Points of the range search."""


class Histogram:
    """Streaming histogram over ``[-reach, reach]``; ``reach`` is a power of two that grows.

    Doubling the reach merges neighbouring bins exactly.
    """

    def __init__(self) -> None:
        self.reach = 0.0
        self.counts: NDArray[np.float64] = np.zeros(_BINS)
        self.low, self.high = np.inf, -np.inf

    def add(
        self,
        values: Array,
        extremes: tuple[float, float] | None = None,
        per_sample: int = VALUES_PER_SAMPLE,
        importance: Array | None = None,
        axis: int = 0,
    ) -> None:
        """Count the values of a batch, subsampled evenly to about ``per_sample`` per row.

        Parameters
        ----------
        values : ndarray
        extremes : tuple of float, optional
            The smallest and the largest finite value, if they are known.
        per_sample : int
        importance : ndarray of shape (n_channels,), optional
            Weight of each value, by its channel along ``axis``.
        axis : int
        """
        low, high = quant_math.finite_extremes(values) if extremes is None else extremes
        picked, step = spread_values(values, per_sample)
        weights = None if importance is None else weights_of(importance, values.shape, step, axis)
        self.count(picked, (low, high), weights)

    def count(self, values: Array, extremes: tuple[float, float], weights: Array | None = None) -> None:
        """Count some values of a tensor with these extremes; of values that are not finite, none."""
        low, high = extremes
        if low > high:
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(abs(self.low), abs(self.high), 1e-30)
        if self.reach == 0.0:
            self.reach = float(2.0 ** np.ceil(np.log2(largest)))
        while self.reach < largest:
            half = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[:] = 0
            self.counts[_BINS // 4 : 3 * _BINS // 4] = half
            self.reach *= 2
        finite = np.isfinite(values)
        if not finite.all():
            values, weights = values[finite], None if weights is None else weights[finite]
        places = values * np.float32(_BINS / (2 * self.reach))
        places += np.float32(_BINS / 2)
        np.clip(places, 0, _BINS - 1, out=places)
        self.counts += np.bincount(places.astype(np.intp), weights, minlength=_BINS)

    def centres(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return centres and counts of the non-empty bins, centres clipped to the exact extremes."""
        filled = np.flatnonzero(self.counts)
        centres = (filled + 0.5) * (2 * self.reach / _BINS) - self.reach
        return np.clip(centres, self.low, self.high), self.counts[filled]


def weights_of(importance: Array, shape: tuple[int, ...], step: int, axis: int) -> Array:
    """Return the weight of every ``step``-th value of a tensor, by its channel along ``axis``."""
    size = math.prod(shape)
    # Short integers are divided several times as fast.
    kind = np.dtype(np.int32) if size < 2**31 else np.dtype(np.int64)
    rows = np.arange(0, size, step, dtype=kind) // math.prod(shape[axis + 1 :])
    return np.asarray(importance[rows % len(importance)], np.float32)


Function = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def identity(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the argument: for tensors whose own error counts."""
    return x


def scalar_function(model: ModelProto, quantizer: ActivationQuantizer) -> Function:
    """Return the elementwise function between the quantizer and the tensor at which its error is measured."""
    if quantizer.through == quantizer.name:
        return identity
    view = GraphView(model)
    between = view.downstream([quantizer.name]) & view.upstream([quantizer.through])
    nodes = [n for n in view.nodes if any(o in between and o != quantizer.name for o in n.output)]
    function = function_of(view, nodes, quantizer.name, quantizer.through)
    return lambda x: function(x.astype(np.float32)).reshape(-1).astype(np.float64)


def minmax_range(
    histogram: Histogram, quantizer: ActivationQuantizer, config: Config, function: Function = identity
) -> tuple[float, float]:
    """Return the extremes."""
    return histogram.low, histogram.high


def percentile_range(
    histogram: Histogram, quantizer: ActivationQuantizer, config: Config, function: Function = identity
) -> tuple[float, float]:
    """Return the range that cuts off ``100 - percentile`` per cent of the values on each side."""
    centres, counts = histogram.centres()
    share = np.cumsum(counts) / counts.sum()
    tail = 1 - config.percentile / 100
    low = centres[min(int(np.searchsorted(share, tail)), len(centres) - 1)]
    high = centres[min(int(np.searchsorted(share, 1 - tail)), len(centres) - 1)]
    return (histogram.low, histogram.high) if config.percentile == 100 else (float(low), float(high))


def mse_range(
    histogram: Histogram, quantizer: ActivationQuantizer, config: Config, function: Function = identity
) -> tuple[float, float]:
    """Return the range with the least squared error behind ``function``.

    Both ends are searched in turn.
    """
    centres, counts = histogram.centres()
    exact = function(centres)

    def error(low: float, high: float) -> float:
        grid, spec = quant_math.activation_grid(low, high, quantizer.spec, quantizer.bounds), quantizer.spec
        steps = centres / float(grid.scale)
        rounded = Levels(spec.format, np.asarray(grid.zero_point)).nearest(steps)
        return float((counts * (function(rounded * float(grid.scale)) - exact) ** 2).sum())

    extremes = (min(histogram.low, 0.0), max(histogram.high, 0.0))
    # First scale both ends together, over decades: with one end at an outlier, the position of the other
    # makes no difference.
    ratios = np.geomspace(1, 1e-3, 2 * _GRID)
    joint = min(ratios, key=lambda r: error(extremes[0] * r, extremes[1] * r))
    ends = [extremes[0] * float(joint), extremes[1] * float(joint)]
    best = error(ends[0], ends[1])
    for spread in (8.0, 1.15):
        for side in (1, 0):
            if ends[side] == 0.0:
                continue
            start = ends[side]
            for factor in np.geomspace(1 / spread, spread, _GRID):
                trial = [*ends]
                trial[side] = float(np.clip(start * factor, *extremes))
                value = error(trial[0], trial[1])
                if value < best:
                    best, ends[side] = value, trial[side]
    return ends[0], ends[1]


_METHODS: dict[
    ActivationRange, Callable[[Histogram, ActivationQuantizer, Config, Function], tuple[float, float]]
] = {
    ActivationRange.MINMAX: minmax_range,
    ActivationRange.PERCENTILE: percentile_range,
    ActivationRange.MSE: mse_range,
}


def calibrate(
    model: ModelProto,
    plan: Plan,
    samples: Samples,
    config: Config,
    progress: Callable[[int, int], None],
    scores: Mapping[str, Array] | None = None,
    known: Calibration | None = None,
) -> Calibration:
    """Choose the range of every activation quantizer.

    Parameters
    ----------
    model : ModelProto
        The normalized float model.
    plan : Plan
    samples : Samples
    config : Config
    progress : callable
        Called with the number of samples done and the total, both counted once per block.
    scores : mapping of str to ndarray of shape (n_samples, n_channels), optional
        Hessian scores; if given, squared errors are weighted by the damped scores of their channels, as in
        HMSE.
    known : Calibration, optional
        An earlier calibration of the same model. Quantizers that it has a grid of keep this grid, and only
        the others are observed, by running the nodes that make them.

    Raises
    ------
    DataError
        If an output of the float model is NaN, or is infinite although the model does not mask it so.
    """
    view = GraphView(model)
    before = known if known is not None else Calibration({}, {}, {})
    ranges = {q.name: Histogram() for q in plan.activations if q.name not in before.grids}
    observed = {t: q for q in plan.activations if q.name in ranges for t in q.sources}
    importance = {
        name: _damped((table / quant_math.unit(table)).mean(axis=0), config.damping)
        for name, table in (scores or {}).items()
        if name in ranges
    }
    sums = {name: PowerSum() for name in _measured(view, plan, config) if name not in before.power}
    found, exact = Finite(view), set(output_parts(view))
    if known is None:
        # Outputs are always checked for NaN and infinity, even if nothing else is measured of them.
        wanted = list(dict.fromkeys([*observed, *sums, *found.outputs]))
    else:
        wanted = list(dict.fromkeys([*observed, *sums]))
        model = edit.giving(model, wanted) if wanted else model
    values = values_of_a_sample(samples.count)
    reader = Reader(observed.keys(), {name: name in exact for name in sums}, found.outputs, values)
    for name, seen, numbers in watch(model, samples, config, (wanted, reader), progress):
        found.add(name, seen, numbers)
        if seen.extremes is not None:
            quantizer, weights = observed[name], importance.get(name)
            if weights is not None:
                weights = weights_of(weights, seen.shape, seen.step, quantizer.channel_axis or 0)
            ranges[quantizer.name].count(seen.picked, seen.extremes, weights)
        if name in sums:
            sums[name].join(seen.power)
    grids = {
        q.name: before.grids.get(q.name) or _activation_grid(q, ranges[q.name], view, config)
        for q in plan.activations
    }
    grids |= constant_grids(plan, view, before.grids)
    return Calibration(
        grids,
        {**before.power, **{n: s.mean_square for n, s in sums.items()}},
        {**before.variance, **{n: s.variance for n, s in sums.items()}},
        _unused(samples),
        {**before.not_finite, **found.shares},
    )


def output_spreads(
    model: ModelProto, samples: Samples, config: Config, progress: Callable[[int, int], None]
) -> Calibration:
    """Return a calibration without grids: the power and variance of what the outputs are assembled from.

    Raises
    ------
    DataError
        As `calibrate` does.
    """
    view = GraphView(model)
    sums = {name: PowerSum() for name in output_parts(view)}
    found = Finite(view)
    reader = Reader((), dict.fromkeys(sums, True), found.outputs)
    wanted = list(dict.fromkeys([*sums, *found.outputs]))
    for name, seen, numbers in watch(model, samples, config, (wanted, reader), progress):
        found.add(name, seen, numbers)
        if name in sums:
            sums[name].join(seen.power)
    return Calibration(
        {},
        {n: s.mean_square for n, s in sums.items()},
        {n: s.variance for n, s in sums.items()},
        _unused(samples),
        found.shares,
    )


def check_outputs(model: ModelProto, samples: Samples, config: Config) -> None:
    """Check that the float model's outputs are finite on samples that `calibrate` does not see.

    Raises
    ------
    DataError
        Names the output and a sample.
    """
    found = Finite(GraphView(model))
    if samples.count and found.outputs:
        wanted = found.outputs, Reader((), {}, found.outputs)
        for name, seen, numbers in watch(model, samples, config, wanted, lambda done, total: None):
            found.add(name, seen, numbers)


def _measured(view: GraphView, plan: Plan, config: Config) -> list[str]:
    """Return the tensors whose power is measured: outputs, and those of layers where later passes need it."""
    layers = [layer.output for layer in plan.layers] if config.optimizes or config.chooses_widths else []
    return list(dict.fromkeys([*layers, *output_parts(view)]))


def _unused(samples: Samples) -> int:
    """Return the number of samples that are left over because the model prescribes the size of a batch."""
    return samples.count - sum(map(len, samples.batches(range(samples.count), samples.micro_batch())))


def _damped(channels: Array, damping: float) -> Array:
    """Return channel scores relative to their mean plus the damping; all 1 if every score is 0."""
    mean = float(channels.mean())
    return (channels / mean + damping).astype(np.float32) if mean > 0 else np.ones_like(channels)


def _activation_grid(
    quantizer: ActivationQuantizer, histogram: Histogram, view: GraphView, config: Config
) -> Grid:
    if quantizer.prescribed is not None:
        return quant_math.prescribed_grid(quantizer.prescribed, quantizer.spec)
    if not np.isfinite(histogram.low):
        return quant_math.activation_grid(0.0, 0.0, quantizer.spec, quantizer.bounds)
    low, high = _METHODS[config.activation_range](
        histogram, quantizer, config, scalar_function(view.model, quantizer)
    )
    return quant_math.activation_grid(low, high, quantizer.spec, quantizer.bounds)
