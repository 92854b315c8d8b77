"""Feeds of the training graph, and errors of candidates on held-out samples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.data.samples import Samples
from eptq_onnx.engines.base import ATTENTION, ERRORS, TrainingGraph
from eptq_onnx.numerics.types import Array, Feeds
from eptq_onnx.parallel import ordered_map
from eptq_onnx.runtime import Session
from eptq_onnx.training import augment


class Batches:
    """Feeds of the training and evaluation graphs for chosen samples.

    Parameters
    ----------
    graph : TrainingGraph
    samples : Samples
    indices : ndarray of shape (n_samples,)
    attention : ndarray of shape (n_samples, n_columns)
        Weight of the mean squared error in each column.
    """

    def __init__(
        self, graph: TrainingGraph, samples: Samples, indices: NDArray[np.int64], attention: Array
    ) -> None:
        self._graph, self._samples, self._indices, self._attention = graph, samples, indices, attention
        self._positions = np.array(
            [*np.repeat(graph.positions, graph.channels), *graph.outputs.values()], np.float32
        )

    def runs(
        self,
        places: NDArray[np.int64],
        parameters: Feeds,
        session: Session,
        rng: np.random.Generator | None = None,
    ) -> Iterator[Feeds]:
        """Yield the feeds of each run for the samples at ``places``; padding of the last run has weight 0.

        With ``rng``, samples are augmented at random and mixed with each other.
        """
        size = self._graph.micro_batch
        padded = np.concatenate([places, np.full(-len(places) % size, -1, np.int64)])
        for part in padded.reshape(-1, size):
            inputs, attention = self._samples.take(self._indices[part]), self._attention[part]
            if rng is not None:
                inputs, attention = self._varied(inputs, attention, places, rng)
            weight = attention * (part >= 0)[:, None] / (self._positions * np.float32(len(places)))
            feeds = {**parameters, **inputs, ATTENTION: weight.astype(np.float32)}
            yield session.taken(feeds)

    def _varied(
        self, inputs: Feeds, attention: Array, places: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[Feeds, Array]:
        axes = self._graph.input_axes
        inputs = augment.moved(inputs, axes, rng)
        if not augment.can_mix(inputs, len(attention)):
            return inputs, attention
        others = rng.choice(places, len(attention))
        share = rng.uniform(size=len(attention)).astype(np.float32)
        inputs = augment.mixed(
            inputs, augment.moved(self._samples.take(self._indices[others]), axes, rng), share
        )
        return inputs, share[:, None] * attention + (1 - share[:, None]) * self._attention[others]


class HeldOut:
    """Weighted errors of hard-rounded candidates for each held-out sample; shape (3, n_samples).

    The rows are the errors of all layers, of the outputs, and of the outputs on unaugmented samples. If the
    optimization sees augmented samples, the first two rows do so too, always with the same variants, because
    a few held-out samples alone distinguish little. The last row ensures that gains reach the original
    samples as well.
    """

    def __init__(
        self,
        graph: TrainingGraph,
        session: Session,
        batches: Batches,
        held: NDArray[np.int64],
        views: int,
        seed: int,
    ) -> None:
        self._session, self._batches, self._held = session, batches, held
        self._views, self._seed = views, seed
        self._layers = sum(graph.channels)

    def __call__(self, parameters: Feeds) -> Array:
        """Return the errors of a candidate, given its feeds; see `Learned.hard_parameters`."""
        rng = np.random.default_rng(self._seed)
        seen = [None] + [rng] * (self._views - 1)
        runs = (
            run for view in seen for run in self._batches.runs(self._held, parameters, self._session, view)
        )
        session, layers = self._session, self._layers

        def errors_of(feeds: Feeds) -> Array:
            # Errors that overflow float32 become infinite, which rejects the candidate.
            with np.errstate(over="ignore", invalid="ignore"):
                errors = session.run(feeds, [ERRORS])[ERRORS] * feeds[ATTENTION]
                return np.stack([part.sum(axis=1) for part in np.split(errors, [layers], axis=1)])

        rows = np.concatenate(list(ordered_map(errors_of, runs)), axis=1).reshape(2, self._views, -1)[
            :, :, : len(self._held)
        ]
        return np.stack([*rows.mean(axis=1), rows[1, 0]])
