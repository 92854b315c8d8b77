"""Calibration samples that fit a model, and how they are batched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.data.layouts import Column
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.parallel import shared

_MICRO_BATCH = 4
"""Samples per run if the model leaves the batch size open."""


class Samples:
    """Calibration samples that fit a model.

    Parameters
    ----------
    columns : mapping of str to Column
        The values of each model input; at least one is not shared.
    fixed_batch : int or None
        Samples in every run: what the model's inputs prescribe, or 1 if samples cannot be batched. None if
        any number works.
    order : ndarray of int, optional
        Indices of the entries that are the samples; all of them by default.
    rows : int
        Approximate number of batch rows in one sample: feeds may hold several.
    """

    def __init__(
        self,
        columns: Mapping[str, Column],
        fixed_batch: int | None,
        order: NDArray[np.int64] | None = None,
        rows: int = 1,
    ) -> None:
        self._columns = dict(columns)
        self.rows = rows
        if any(c.axis is None and not c.shared for c in columns.values()):
            # Values that differ between runs and have no batch axis cannot be batched.
            fixed_batch = 1
        self.fixed_batch = fixed_batch
        entries = next(c.count for c in columns.values() if c.count is not None)
        self._order = np.arange(entries) if order is None else np.asarray(order, np.int64)
        self.count = len(self._order)
        self._kinds = self._kinds_of_samples()

    def _kinds_of_samples(self) -> NDArray[np.int64]:
        """Return a number for each sample that identifies the shapes of its inputs."""
        lists = [c.values for c in self._columns.values() if isinstance(c.values, list)]
        numbers: dict[tuple[object, ...], int] = {}
        keys = (tuple(values[k].shape for values in lists) for k in self._order.tolist())
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)

    @property
    def identity(self) -> tuple[object, ...]:
        """Return everything that distinguishes these samples from others."""
        return self._columns, self.fixed_batch, self._order, self.rows

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the model inputs."""
        return tuple(self._columns)

    @property
    def layout(self) -> dict[str, str]:
        """Return a description of how the axes of each input were interpreted."""
        return {name: str(column) for name, column in self._columns.items()}

    def has_samples(self, name: str) -> bool:
        """Return False for an input with one value for all samples."""
        return not self._columns[name].shared

    def alike(self) -> NDArray[np.int64]:
        """Return the indices of the samples of the most frequent shape, for steps that need fixed shapes.

        Usually that is all of them. Samples with an empty input count only if there are no others.
        """
        lists = [c.values for c in self._columns.values() if isinstance(c.values, list)]
        full = [all(values[k].size for values in lists) for k in self._order.tolist()] if lists else [True]
        kinds = self._kinds[np.array(full)] if lists and any(full) else self._kinds
        return np.flatnonzero(self._kinds == np.bincount(kinds).argmax())

    def shared(self) -> Samples:
        """Return the same samples, kept where all workers reach them (`eptq_onnx.parallel`)."""
        columns = {}
        for name, column in self._columns.items():
            found = shared(column.values if isinstance(column.values, list) else [column.values])
            columns[name] = replace(column, values=found if isinstance(column.values, list) else found[0])
        return Samples(columns, self.fixed_batch, self._order, self.rows)

    def only(self, indices: Sequence[int] | NDArray[np.int64]) -> Samples:
        """Return some of the samples, in this order, without copying them."""
        return Samples(self._columns, self.fixed_batch, self._order[np.asarray(indices, np.int64)], self.rows)

    def numbers(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the original numbers of these samples."""
        return self._order[np.asarray(indices, np.int64)]

    def in_batches_of(self, size: int | None) -> Samples:
        """Return the same samples with a fixed number per run."""
        return Samples(self._columns, size, self._order, self.rows)

    def alone(self) -> Samples:
        """Return the same samples, one per run unless the model prescribes more: for networks whose results
        depend on what else is in a batch.
        """
        return self.in_batches_of(self.fixed_batch or 1)

    def grouped(self, size: int) -> Samples:
        """Group ``size`` consecutive samples into one that fills a run; leftover samples are dropped."""
        parts = list(self.in_batches_of(size).batches(range(self.count), size))
        feeds = [self.take(part) for part in parts]
        return Samples(
            {n: c if c.shared else Column([f[n] for f in feeds]) for n, c in self._columns.items()},
            1,
            rows=size,
        )

    def with_columns(self, columns: Mapping[str, Column]) -> Samples:
        """Return the same samples with additional inputs, one entry per sample."""
        if not np.array_equal(self._order, np.arange(self.count)):
            raise ValueError("inputs are added to all samples only")
        return Samples({**self._columns, **columns}, self.fixed_batch, self._order, self.rows)

    def micro_batch(self, wanted: int | None = None) -> int:
        """Return the samples per run: what the model prescribes, else a small number, at most ``wanted``.

        Small batches run side by side (`eptq_onnx.parallel`) and cost no more per sample than large ones.
        """
        return self.fixed_batch or max(1, min(wanted or _MICRO_BATCH, _MICRO_BATCH, self.count))

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Feeds:
        """Return the samples at ``indices``, which must have the same shapes, as one batch."""
        feeds: Feeds = {}
        places = self._order[np.asarray(indices, np.int64)]
        for name, column in self._columns.items():
            values, axis = column.values, column.axis
            if column.shared:
                feeds[name] = np.asarray(values)
            elif axis is None:
                feeds[name] = np.asarray(values[int(places[0])])
            else:
                rows = (
                    values[places]
                    if isinstance(values, np.ndarray)
                    else np.stack([values[int(i)] for i in places])
                )
                feeds[name] = np.ascontiguousarray(np.moveaxis(rows, 0, axis))
        return feeds

    def two_batches(self, size: int) -> tuple[Feeds, Feeds]:
        """Return batches of the first and the last samples of the most frequent shape, repeated as needed."""
        alike = self.alike()
        first = np.arange(size) % len(alike)
        return self.take(alike[first]), self.take(alike[len(alike) - 1 - first])

    def parts(self, indices: Sequence[int] | NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
        """Split sample indices into batches of equal shapes; yield positions in ``indices``.

        The last batch of a shape is short, or left out if the model prescribes the batch size.
        """
        kinds = self._kinds[np.asarray(indices, np.int64)]
        for kind in dict.fromkeys(kinds.tolist()):
            places = np.flatnonzero(kinds == kind)
            for start in range(0, len(places), size):
                part = places[start : start + size]
                if len(part) == size or self.fixed_batch is None:
                    yield part

    def batches(self, indices: Sequence[int] | NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
        """Split sample indices into batches as `parts` does; yield sample indices."""
        chosen = np.asarray(indices, np.int64)
        return (chosen[part] for part in self.parts(chosen, size))


def filled_batches(samples: Samples, indices: NDArray[np.int64], size: int) -> Iterator[Feeds]:
    """Yield samples of one shape in batches of a size; the last batch is filled from the start."""
    for begin in range(0, len(indices), size):
        yield samples.take(indices[np.arange(begin, begin + size) % len(indices)])


def spread(count: int, limit: int) -> NDArray[np.int64]:
    """Return at most ``limit`` of ``count`` indices, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64))


@dataclass(frozen=True)
class Selection:
    """A subset of the samples.

    Parameters
    ----------
    samples : Samples
    indices : ndarray of shape (n_samples,)
        Indices of the subset.
    """

    samples: Samples
    indices: NDArray[np.int64]
