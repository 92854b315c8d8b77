"""How far the outputs of other versions of a model are from its own, measured by running them on some
samples."""

from __future__ import annotations

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
"""Of the outputs, which are kept."""
LOST = 1e30
"""Noise of outputs that are no numbers any more."""


class Deviation:
    """Noise-to-signal power ratio of a model's outputs, each part of them in units of its own spread; all
    parts count alike.

    Parameters
    ----------
    model : ModelProto
    samples : Samples
    indices : ndarray of shape (n_samples,)
        Samples to choose from, evenly.
    count : int
        How many are run; at least a batch.
    variance : mapping of str to float
        Of the tensors that the outputs are put together from; those without any are not looked at.
    config : Config
    size : int, optional
        Samples a run; by default as many as run best.
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
        self.parts = [p for p in output_parts(GraphView(model)) if variance.get(p, 0.0) > 0]
        """Tensors that are compared."""
        self._variances = [variance[p] for p in self.parts]
        size = size or samples.micro_batch()
        self._shapes = samples.two_batches(size)
        shaped = GraphView(specialize(model, self._shapes))
        most = max(1, _MOST_BYTES // max(sum(bytes_of(shaped, p) for p in self.parts), 1))
        run = indices[spread(len(indices), max(count, size))]
        self._batches = [samples.take(chosen) for chosen in samples.batches(run, size)][:most]
        self._exact = self._outputs(model, {}) if self.parts else []

    def __call__(self, other: ModelProto, read_as: Mapping[str, str] | None = None) -> float:
        """Of another version, in which some tensors are read under other names."""
        return mean_noise(self.of_runs(other, read_as))

    def of_runs(self, other: ModelProto, read_as: Mapping[str, str] | None = None) -> NDArray[np.float64]:
        """What each run adds to the ratio of each of ``parts``, of shape (n_runs, n_parts); the mean over
        runs is the ratio."""
        return noise(self._exact, self._outputs(other, read_as or {}), self._variances)

    def _outputs(self, model: ModelProto, read_as: Mapping[str, str]) -> list[list[Array]]:
        """Batch by batch, the parts of the outputs."""
        if self._config.block_bytes is not None:
            # What crosses from block to block must have a known type.
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
    """Squared difference of each part of the outputs, in units of the part's variance, run by run; shape
    (n_runs, n_parts).

    A run counts as much as it has elements, so that the mean over runs is that over all elements. What has
    another size than before, for that depends on values, is lost: its error counts as its variance.
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
    """Sum of squared differences, and of how many elements."""
    # Where the float network has no number there is nothing to compare.
    known = np.isfinite(reference)
    size = max(int(np.count_nonzero(known)), 1)
    if value.shape != reference.shape:
        return variance * size, size
    difference = np.subtract(reference, value, out=np.zeros_like(reference), where=known)
    return (quant_math.square_sum(difference.reshape(-1)) if np.isfinite(difference).all() else np.inf), size


def mean_noise(ratios: NDArray[np.float64]) -> float:
    """Over all runs and parts; all count alike."""
    return min(float(ratios.mean()), LOST)
