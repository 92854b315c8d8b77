"""Calibration data: reading, checking against the model, batching."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from eptq_onnx.errors import DataError
from eptq_onnx.readers import Source, opened
from eptq_onnx.types import Feeds

_MICRO_BATCH = 4


class Samples:
    """Calibration samples that fit a model.

    Parameters
    ----------
    arrays : mapping of str to ndarray or sequence of ndarray
        For each model input one array, samples along the first axis, or, where samples differ in size, one array a
        sample. For an input that has no batch axis its value, or one value a sample.
    fixed_batch : int or None
        Batch size that the model's inputs prescribe.
    axes : mapping of str to int or None, optional
        Batch axis of each model input, None for an input without one (a sampling rate, say). By default 0.
    """

    def __init__(
        self,
        arrays: Mapping[str, NDArray[np.generic] | Sequence[NDArray[np.generic]]],
        fixed_batch: int | None,
        axes: Mapping[str, int | None] | None = None,
    ) -> None:
        self._arrays, self._axes = dict(arrays), dict(axes) if axes is not None else dict.fromkeys(arrays, 0)
        self.fixed_batch = fixed_batch
        self.count = next(len(a) for name, a in self._arrays.items() if self._axes[name] is not None)
        self._kinds = self._kinds_of_samples()

    def _kinds_of_samples(self) -> NDArray[np.int64]:
        """A number for each sample: those with the same go into one batch."""
        lists = [(name, a) for name, a in self._arrays.items() if not isinstance(a, np.ndarray)]
        numbers: dict[tuple[object, ...], int] = {}
        keys = (
            tuple(a[k].shape if self._axes[name] is not None else (a[k].shape, a[k].tobytes()) for name, a in lists)
            for k in range(self.count)
        )
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model inputs."""
        return tuple(self._arrays)

    def has_samples(self, name: str) -> bool:
        """False for an input without a batch axis: it has one value for all samples."""
        return self._axes[name] is not None

    def alike(self) -> NDArray[np.int64]:
        """Indices of the samples of the most frequent size: what needs fixed shapes looks at these. All, mostly."""
        return np.flatnonzero(self._kinds == np.bincount(self._kinds).argmax())

    def micro_batch(self, wanted: int | None = None) -> int:
        """Samples that one run of the model takes: what the model prescribes, else at most ``wanted``, and few.

        Small batches run side by side (`eptq_onnx.parallel`) and cost no more a sample than large ones.
        """
        return self.fixed_batch or max(1, min(wanted or _MICRO_BATCH, _MICRO_BATCH, self.count))

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Feeds:
        """The samples at ``indices``, which are of one size, as one batch."""
        feeds: Feeds = {}
        for name, array in self._arrays.items():
            axis = self._axes[name]
            if axis is None:
                feeds[name] = array if isinstance(array, np.ndarray) else array[int(indices[0])]
            else:
                rows = array[indices] if isinstance(array, np.ndarray) else np.stack([array[int(i)] for i in indices])
                feeds[name] = np.ascontiguousarray(np.moveaxis(rows, 0, axis))
        return feeds

    def two_batches(self, size: int) -> tuple[Feeds, Feeds]:
        """Batches of the first and of the last samples of the most frequent size, repeated where there are fewer."""
        alike = self.alike()
        first = np.arange(size) % len(alike)
        return self.take(alike[first]), self.take(alike[len(alike) - 1 - first])

    def parts(self, indices: Sequence[int] | NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
        """Split sample indices into batches of samples of one size; yields places in ``indices``.

        The last batch of a size is short, or left out if the model prescribes the batch.
        """
        kinds = self._kinds[np.asarray(indices, np.int64)]
        for kind in dict.fromkeys(kinds.tolist()):
            places = np.flatnonzero(kinds == kind)
            for start in range(0, len(places), size):
                part = places[start : start + size]
                if len(part) == size or self.fixed_batch is None:
                    yield part

    def batches(self, indices: Sequence[int] | NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
        """Split sample indices into batches, as `parts` does; yields sample indices."""
        chosen = np.asarray(indices, np.int64)
        return (chosen[part] for part in self.parts(chosen, size))


def spread(count: int, limit: int) -> NDArray[np.int64]:
    """At most ``limit`` of ``count`` places, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64))


def read(source: Source, model: ModelProto) -> Samples:
    """Read calibration data and check that it fits the model.

    Parameters
    ----------
    source : Source
        See `eptq_onnx.readers.opened`: arrays, feeds, files, or a function that gives them.
    model : ModelProto

    Raises
    ------
    DataError
        If data is missing, unreadable, or of the wrong name, shape, type or value.
    """
    inputs = _inputs(model)
    if not inputs:
        raise DataError("the model has no input to feed calibration data to.")
    given, label = opened(source)
    if isinstance(given, np.ndarray):
        if len(inputs) != 1:
            raise DataError(f"the model has {len(inputs)} inputs ({_names(inputs)}): give a mapping from name to array.")
        given = {inputs[0].name: given}
    axes, batch = _batch_axes([_symbols(i) for i in inputs])
    named = {i.name: axis for i, axis in zip(inputs, axes, strict=True)}
    if not isinstance(given, Mapping):
        given = _split_feeds(given, inputs, named, label)
    _check_names(given, inputs, label)
    checked = {i.name: _checked(given[i.name], i, named[i.name], label) for i in inputs}
    if all(axis is None for axis in axes):
        raise DataError("no input of the model has a batch axis: there is nothing to calibrate with.")
    counts = {name: len(a) for name, a in checked.items() if named[name] is not None or isinstance(a, list)}
    if len(set(counts.values())) > 1:
        raise DataError(f"{label} has different numbers of samples: {', '.join(f'{n}: {c}' for n, c in counts.items())}.")
    if not next(iter(counts.values())):
        raise DataError(f"{label} has no samples.")
    samples = Samples(checked, batch, named)
    if batch is not None and next(samples.parts(range(samples.count), batch), None) is None:
        alike = len(samples.alike())
        raise DataError(
            f"{label} has {alike} samples{' of one size' * (alike < samples.count)}, but the model takes {batch} at a time: "
            f"give at least {batch}."
        )
    return samples


def _check_names(given: Mapping[str, object], inputs: Sequence[ValueInfoProto], label: str) -> None:
    missing = [i.name for i in inputs if i.name not in given]
    if missing:
        raise DataError(f"{label} has no array for the model input {missing[0]!r} (it has: {', '.join(map(repr, given)) or 'none'}).")
    unknown = [name for name in given if name not in {i.name for i in inputs}]
    if unknown:
        raise DataError(f"{label} has an array {unknown[0]!r}, but the model has no such input (it has: {_names(inputs)}).")


def _split_feeds(
    feeds: Sequence[Mapping[str, NDArray[np.generic]]], inputs: Sequence[ValueInfoProto], axes: Mapping[str, int | None], label: str
) -> dict[str, NDArray[np.generic] | list[NDArray[np.generic]]]:
    """What the model takes in each run, batch axis and all, as one array a sample."""
    samples: dict[str, list[NDArray[np.generic]]] = {i.name: [] for i in inputs}
    for k, feed in enumerate(feeds):
        where = f"{label}, feed {k}"
        _check_names(feed, inputs, where)
        arrays = {i.name: np.asarray(feed[i.name]) for i in inputs}
        counts = {n: a.shape[axes[n] or 0] for n, a in arrays.items() if axes[n] is not None and a.ndim > (axes[n] or 0)}
        if len(set(counts.values())) != 1:
            raise DataError(f"{where} has batches of different sizes: {', '.join(f'{n}: {c}' for n, c in counts.items()) or 'none'}.")
        count = next(iter(counts.values()))
        for name, array in arrays.items():
            samples[name].extend(np.moveaxis(array, axes[name] or 0, 0) if name in counts else [array] * count)
    return {name: _stacked(values, axes[name]) for name, values in samples.items()}


def _stacked(values: list[NDArray[np.generic]], axis: int | None) -> NDArray[np.generic] | list[NDArray[np.generic]]:
    """One array where all samples have one shape (or, without a batch axis, one value)."""
    if axis is None:
        return values[0] if values and all(np.array_equal(v, values[0]) for v in values) else values
    return np.stack(values) if values and len({v.shape for v in values}) == 1 else values


def _checked(
    given: NDArray[np.generic] | Sequence[NDArray[np.generic]], info: ValueInfoProto, axis: int | None, label: str
) -> NDArray[np.generic] | list[NDArray[np.generic]]:
    """The array, or one array a sample, after the check."""
    elem_type, dims = info.type.tensor_type.elem_type, _symbols(info)
    array = given if isinstance(given, list) else np.asarray(given)
    if isinstance(array, np.ndarray) and array.dtype.kind != "O":
        _check_array(array, info.name, elem_type, dims, axis, label)
        return array
    values = [np.asarray(v) for v in given]
    for k, value in enumerate(values):
        _check_array(value if axis is None else value[None], info.name, elem_type, dims, axis, f"{label}, sample {k}")
    return _stacked(values, axis)


def expected(model: ModelProto, count: int, size: int) -> dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]]:
    """Shape and type of the array of every model input, for ``count`` samples, with open dimensions of ``size``.

    Dimensions of the same name get the same size because all get one; the batch axis goes to the front.
    """
    inputs = _inputs(model)
    axes, _ = _batch_axes([_symbols(i) for i in inputs])
    result = {}
    for info, axis in zip(inputs, axes, strict=True):
        sizes = [d if isinstance(d, int) else size for d in _symbols(info) or []]
        if axis is not None:
            sizes = [count, *sizes[:axis], *sizes[axis + 1 :]]
        result[info.name] = tuple(sizes), np.dtype(helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))
    return result


def _inputs(model: ModelProto) -> list[ValueInfoProto]:
    constants = {t.name for t in model.graph.initializer}
    return [i for i in model.graph.input if i.name not in constants]


Symbol = int | str | None
"""Size of an axis: a number, a name, or unknown."""


def _batch_axes(inputs: Sequence[Sequence[Symbol] | None]) -> tuple[list[int | None], int | None]:
    """The batch axis of each input, None for those without one; and the batch size, if the model prescribes it.

    The batch is the first axis of the first input that has one; the others have it where the same name or number
    stands, the state of a recurrent network on its second axis, say.
    """
    first = next((dims[0] for dims in inputs if dims), None)
    axes: list[int | None] = []
    for dims in inputs:
        if dims is None:
            axes.append(0)
        elif not dims:
            axes.append(None)
        elif isinstance(first, int):
            axes.append(next((k for k, d in enumerate(dims) if d == first), 0 if not isinstance(dims[0], int) else None))
        elif not isinstance(dims[0], int):
            axes.append(0)
        else:
            same = [k for k, d in enumerate(dims) if d == first and first is not None]
            free = [k for k, d in enumerate(dims) if not isinstance(d, int)]
            # All sizes are fixed: so is the batch.
            axes.append(next(iter([*same, *free]), 0))
    fixed = [dims[axis] for dims, axis in zip(inputs, axes, strict=True) if dims and axis is not None]
    return axes, next((d for d in fixed if isinstance(d, int)), None)


def _names(inputs: Sequence[object]) -> str:
    return ", ".join(repr(i.name) for i in inputs)  # type: ignore[attr-defined]


def _symbols(info: object) -> list[Symbol] | None:
    tensor = info.type.tensor_type  # type: ignore[attr-defined]
    if not tensor.HasField("shape"):
        return None
    return [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param or None for d in tensor.shape.dim]


def _check_array(array: NDArray[np.generic], name: str, elem_type: int, dims: list[Symbol] | None, axis: int | None, label: str) -> None:
    expected = helper.tensor_dtype_to_np_dtype(elem_type) if elem_type != TensorProto.UNDEFINED else array.dtype
    if array.dtype != expected:
        raise DataError(f"{label}: input {name!r} has type {array.dtype}, but the model wants {np.dtype(expected)}.")
    if dims is not None:
        rest = dims if axis is None else [*dims[:axis], *dims[axis + 1 :]]
        shape = array.shape if axis is None else array.shape[1:]
        fits = len(shape) == len(rest) and all(not isinstance(d, int) or s == d for s, d in zip(shape, rest, strict=False))
        if not fits or (axis is not None and array.ndim == 0):
            wanted = ", ".join([*([] if axis is None else ["samples"]), *(str(d) if isinstance(d, int) else "any" for d in rest)])
            why = ", the same value for all samples" if axis is None else ""
            raise DataError(f"{label}: input {name!r} has shape {array.shape}, but the model wants ({wanted}){why}.")
    elif array.ndim == 0:
        raise DataError(f"{label}: input {name!r} is a scalar: samples go along the first axis.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        rows = array.reshape(len(array), -1) if axis is not None else array.reshape(1, -1)
        bad = int(np.argwhere(~np.isfinite(rows).all(axis=1))[0, 0])
        raise DataError(f"{label}: input {name!r} has NaN or Inf in sample {bad}.")
