"""Output error of modified versions of a model, measured on a subset of the samples."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx.config import Config
from eptq_onnx.data.samples import Samples, spread
from eptq_onnx.execute.blocks import blocks_of, bytes_of, observe
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.types import Array, Feeds
from eptq_onnx.ops import output_parts

_MOST_BYTES = 2**28
"""Limit on the bytes of reference outputs kept in memory."""
LOST = 1e30
"""Noise of outputs that have become NaN or infinite."""


class Deviation:
    """Noise-to-signal power ratio of the outputs of modified versions of a model.

    Outputs are split into parts (`eptq_onnx.ops.output_parts`). The error of each part is divided by the
    variance of that part, and all parts have equal weight.

    Parameters
    ----------
    model : ModelProto
        The reference.
    samples : Samples
    indices : ndarray of shape (n_samples,)
        Samples to choose from; the chosen ones are spread evenly.
    count : int
        Number of samples to run; at least one batch.
    variance : mapping of str to float
        Variance of each output part; parts with variance 0 or without an entry are ignored.
    config : Config
    size : int, optional
        Samples per run; by default the size of a micro-batch.
    """

    def __init__(
        self,
        model: ModelProto,
        samples: Samples,
        indices: NDArray[np.int64],
        count: int,
        variance: Mapping[str, float],
        config: Config,
        size: int | None = None,
    ) -> None:
        self._config = config
        self.parts = [p for p in output_parts(GraphView(model), config.outputs) if variance.get(p, 0.0) > 0]
        """Names of the tensors that are compared."""
        self._variances = [variance[p] for p in self.parts]
        size = size or samples.micro_batch()
        self._shapes = samples.two_batches(size)
        shaped = GraphView(specialize(model, self._shapes))
        most = max(1, _MOST_BYTES // max(sum(bytes_of(shaped, p) for p in self.parts), 1))
        run = indices[spread(len(indices), max(count, size))]
        chosen = list(samples.batches(run, size))[:most]
        self.samples = sum(map(len, chosen))
        """Number of samples that are run."""
        self._batches = [samples.take(part) for part in chosen]
        self._exact = self._outputs(model, {}) if self.parts else []

    def on_fewer(self, count: int) -> Deviation:
        """Return the same on fewer of the samples: at least ``count``, and two runs if there are two."""
        fewer = copy.copy(self)
        least = max(2, -(-count * len(self._batches) // max(self.samples, 1)))
        kept = spread(len(self._batches), least)
        fewer._batches = [self._batches[k] for k in kept]
        fewer._exact = [self._exact[k] for k in kept] if self.parts else []
        fewer.samples = self.samples * len(kept) // max(len(self._batches), 1)
        return fewer

    def __call__(self, other: ModelProto, read_as: Mapping[str, str] | None = None) -> float:
        """Return the noise of another version; ``read_as`` maps tensors to their names in it."""
        return mean_noise(self.of_runs(other, read_as))

    def of_runs(self, other: ModelProto, read_as: Mapping[str, str] | None = None) -> NDArray[np.float64]:
        """Return the noise of each run and part, of shape (n_runs, n_parts); see `noise`."""
        return noise(self._exact, self._outputs(other, read_as or {}), self._variances)

    def _outputs(self, model: ModelProto, read_as: Mapping[str, str]) -> list[list[Array]]:
        """Return the output parts of every batch."""
        if self._config.block_bytes is not None:
            # Tensors that cross from block to block must have a known type.
            model = infer_shapes(model)
        found: list[Feeds] = [{} for _ in self._batches]
        wanted = [read_as.get(p, p) for p in self.parts]
        blocks = blocks_of(model, self._shapes, self._config.block_bytes)
        for k, values in observe(blocks, self._batches, list(dict.fromkeys(wanted))):
            found[k] |= values
        return [[values[name] for name in wanted] for values in found]


def noise(
    exact: Iterable[Sequence[Array]], got: Iterable[Sequence[Array]], variances: Sequence[float]
) -> NDArray[np.float64]:
    """Return the squared error of each output part in units of its variance, of shape (n_runs, n_parts).

    Each run is weighted by its number of elements, so that the mean over runs is the mean over all elements.
    A part whose size depends on values and differs from the reference counts as lost: its error is its
    variance.
    """
    errors, sizes = list[list[float]](), list[list[int]]()
    for pair in zip(exact, got, strict=True):
        row = [
            _squares(reference, value, variance)
            for reference, value, variance in zip(*pair, variances, strict=True)
        ]
        errors.append([error for error, _ in row])
        sizes.append([size for _, size in row])
    ratios = np.asarray(errors) / np.maximum(np.mean(sizes, axis=0), 1) / variances
    return np.where(np.isfinite(ratios), np.minimum(ratios, LOST), LOST)


def _squares(reference: Array, value: Array, variance: float) -> tuple[float, int]:
    """Return the sum of squared differences and the number of elements in it."""
    # Elements that are not finite in the float network cannot be compared.
    known = np.isfinite(reference)
    size = max(int(np.count_nonzero(known)), 1)
    if value.shape != reference.shape:
        return variance * size, size
    difference = np.subtract(reference, value, out=np.zeros_like(reference), where=known)
    return (quant_math.square_sum(difference.reshape(-1)) if np.isfinite(difference).all() else np.inf), size


def mean_noise(ratios: NDArray[np.float64]) -> float:
    """Return the mean over all runs and parts, each with equal weight, limited to `LOST`."""
    return min(float(ratios.mean()), LOST)
