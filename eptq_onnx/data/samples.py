"""Calibration data: reading, checking against the model, batching."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from eptq_onnx.data.layouts import Axes, Column, Symbol, Values, along, batch_axes, fits, is_batch, readings
from eptq_onnx.data.readers import Feed, Source, opened
from eptq_onnx.errors import DataError
from eptq_onnx.numerics.types import Feeds

_MICRO_BATCH = 4


class Samples:
    """Calibration samples that fit a model.

    Parameters
    ----------
    columns : mapping of str to Column
        The values of each model input; at least one is not shared.
    fixed_batch : int or None
        Samples that every run takes: what the model's inputs prescribe, or 1 where samples cannot be put
        together. None: any number.
    order : ndarray of int, optional
        The entries that are the samples; all of them by default.
    rows : int
        About how many rows of a batch a sample is: feeds may hold several.
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
            # What differs from run to run and has no batch axis cannot be put together.
            fixed_batch = 1
        self.fixed_batch = fixed_batch
        entries = next(c.count for c in columns.values() if c.count is not None)
        self._order = np.arange(entries) if order is None else np.asarray(order, np.int64)
        self.count = len(self._order)
        self._kinds = self._kinds_of_samples()

    def _kinds_of_samples(self) -> NDArray[np.int64]:
        """A number for each sample: those with the same have inputs of the same shapes."""
        lists = [c.values for c in self._columns.values() if isinstance(c.values, list)]
        numbers: dict[tuple[object, ...], int] = {}
        keys = (tuple(values[k].shape for values in lists) for k in self._order.tolist())
        return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells these samples from others."""
        return self._columns, self.fixed_batch, self._order, self.rows

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model inputs."""
        return tuple(self._columns)

    @property
    def layout(self) -> dict[str, str]:
        """What was made of the axes of each input, in words."""
        return {name: str(column) for name, column in self._columns.items()}

    def has_samples(self, name: str) -> bool:
        """False for an input that has one value for all samples."""
        return not self._columns[name].shared

    def alike(self) -> NDArray[np.int64]:
        """Indices of the samples of the most frequent size: what needs fixed shapes looks at these. All,
        mostly.

        Samples with nothing in some input count only if there are no others.
        """
        lists = [c.values for c in self._columns.values() if isinstance(c.values, list)]
        full = [all(values[k].size for values in lists) for k in self._order.tolist()] if lists else [True]
        kinds = self._kinds[np.array(full)] if lists and any(full) else self._kinds
        return np.flatnonzero(self._kinds == np.bincount(kinds).argmax())

    def only(self, indices: Sequence[int] | NDArray[np.int64]) -> Samples:
        """Some of the samples, in this order; they are not copied."""
        return Samples(self._columns, self.fixed_batch, self._order[np.asarray(indices, np.int64)], self.rows)

    def numbers(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of the given samples these are."""
        return self._order[np.asarray(indices, np.int64)]

    def in_batches_of(self, size: int | None) -> Samples:
        """The same samples, of which every run takes so many."""
        return Samples(self._columns, size, self._order, self.rows)

    def grouped(self, size: int) -> Samples:
        """Samples that are what one run takes: so many of these, one after the other; the last are left
        out."""
        parts = list(self.in_batches_of(size).batches(range(self.count), size))
        feeds = [self.take(part) for part in parts]
        return Samples(
            {n: c if c.shared else Column([f[n] for f in feeds]) for n, c in self._columns.items()},
            1,
            rows=size,
        )

    def with_columns(self, columns: Mapping[str, Column]) -> Samples:
        """The same samples with the values of more inputs, one entry a sample."""
        if not np.array_equal(self._order, np.arange(self.count)):
            raise ValueError("inputs are added to all samples only")
        return Samples({**self._columns, **columns}, self.fixed_batch, self._order, self.rows)

    def micro_batch(self, wanted: int | None = None) -> int:
        """Samples that one run of the model takes: what the model prescribes, else at most ``wanted``, and
        few.

        Small batches run side by side (`eptq_onnx.parallel`) and cost no more a sample than large ones.
        """
        return self.fixed_batch or max(1, min(wanted or _MICRO_BATCH, _MICRO_BATCH, self.count))

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Feeds:
        """The samples at ``indices``, which are of one size, as one batch."""
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
        """Batches of the first and of the last samples of the most frequent size, repeated where there are
        fewer."""
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


@dataclass(frozen=True)
class Selection:
    """Some of the samples.

    Parameters
    ----------
    samples : Samples
    indices : ndarray of shape (n_samples,)
        Which.
    """

    samples: Samples
    indices: NDArray[np.int64]


def read(source: Source, model: ModelProto, given: Axes | None = None) -> Samples:
    """Calibration data as it most likely is meant; see `candidates`."""
    return candidates(source, model, given)[0]


def candidates(source: Source, model: ModelProto, given: Axes | None = None) -> list[Samples]:
    """Read calibration data and check that it fits the model.

    Parameters
    ----------
    source : Source
        See `eptq_onnx.data.readers.opened`: arrays, feeds, files, or a function that gives them.
    model : ModelProto
    given : mapping of str to int or None, optional
        The batch axes of some inputs, None for those that have none.

    Returns
    -------
    list of Samples
        What the data may mean, most likely first.

    Raises
    ------
    DataError
        If data is missing, unreadable, or of the wrong name, shape, type or value.
    """
    inputs = _inputs(model)
    if not inputs:
        raise DataError("the model has no input to feed calibration data to.")
    dims = {i.name: _symbols(i) for i in inputs}
    given = _checked_axes(given or {}, dims)
    data, label = opened(source)
    if isinstance(data, np.ndarray):
        if len(inputs) != 1:
            raise DataError(
                f"the model has {len(inputs)} inputs ({_names(inputs)}): give a mapping from name to array."
            )
        data = {inputs[0].name: data}
    if not isinstance(data, Mapping):
        return [_of_feeds(data, inputs, label)]
    _check_names(data, inputs, label)
    values = {i.name: _checked(data[i.name], i, label) for i in inputs}
    found: list[Samples] = []
    errors: list[DataError] = []
    for axes in batch_axes(dims, given):
        try:
            found.append(_arranged(values, dims, axes, given, label))
        except DataError as e:
            errors.append(e)
    if not found:
        raise errors[0]
    whole = {
        n: Column(v[None]) for n, v in values.items() if isinstance(v, np.ndarray) and fits(v.shape, dims[n])
    }
    if len(whole) == len(values):
        found.append(Samples(whole, 1))
    return found


def _arranged(
    values: Mapping[str, Values],
    dims: Mapping[str, Sequence[Symbol] | None],
    axes: Axes,
    given: Axes,
    label: str,
) -> Samples:
    """The samples, if batches lie along these axes."""
    signs = {name: (dims[name] or (None,))[axis] for name, axis in axes.items() if axis is not None}
    # What has the batch's name, or an open size without one, is no value for all samples.
    common = {
        name for name, sign in signs.items() if sign is None or list(signs.values()).count(sign) > 1
    } - {name for name, sign in signs.items() if isinstance(sign, int)}
    options = {
        name: readings(name, v, dims[name], axes[name], label, batched=name in common)
        for name, v in values.items()
    }
    sole = {
        name: found[0].count for name, found in options.items() if len(found) == 1 and not found[0].shared
    }
    if not sole:
        sole = {name: found[0].count for name, found in options.items() if not found[0].shared}
    if not sole:
        # All arrays are what one run takes.
        return Samples({name: Column(np.asarray(v)[None]) for name, v in values.items()}, 1)
    first = next(iter(sole.values())) or 0
    columns: dict[str, Column] = {}
    for name, found in options.items():
        fitting = [c for c in found if c.count == first] or [c for c in found if c.shared]
        turned = (
            along(np.asarray(values[name]), axes[name] or 0, first)
            if name in given and axes[name] and not fitting
            else None
        )
        if turned is not None:
            fitting = [turned]
        if not fitting:
            counts = ", ".join(
                f"{n}: {options[n][0].count}" for n in options if options[n][0].count is not None
            )
            raise DataError(f"{label} has different numbers of samples: {counts}.")
        columns[name] = _shared_if_equal(fitting[0])
    if not any(not c.shared for c in columns.values()):
        columns = {
            name: Column(c.values[None] if isinstance(c.values, np.ndarray) else [c.values[0]])
            for name, c in columns.items()
        }
    if not first:
        raise DataError(f"{label} has no samples.")
    samples = Samples(columns, _prescribed(columns, dims, label))
    batch = samples.fixed_batch
    if batch is not None and next(samples.parts(range(samples.count), batch), None) is None:
        alike = len(samples.alike())
        raise DataError(
            f"{label} has {alike} samples{' of one size' * (alike < samples.count)}, but the model takes {batch} at a time: "
            f"give at least {batch}."
        )
    return samples


def _shared_if_equal(column: Column) -> Column:
    """One value for all samples, if that is what all entries are: it leaves batches open."""
    if column.shared or column.axis is not None or len(column.values) < 2:
        return column
    first, *others = column.values
    same = all(np.array_equal(first, other) for other in others)
    return Column(np.asarray(first), shared=True) if same else column


def _prescribed(
    columns: Mapping[str, Column], dims: Mapping[str, Sequence[Symbol] | None], label: str
) -> int | None:
    """The batch size that the model's inputs prescribe; None if they leave it open."""
    sizes = {n: (dims[n] or ())[c.axis] for n, c in columns.items() if c.axis is not None and dims[n]}
    fixed = {n: d for n, d in sizes.items() if isinstance(d, int)}
    batch = next(iter(fixed.values()), None)
    alone = next((n for n, c in columns.items() if c.axis is None and not c.shared), None)
    if len(set(fixed.values())) > 1 or (alone is not None and batch not in (None, 1)):
        listing = ", ".join(f"{n}: {d}" for n, d in fixed.items()) + (
            f", {alone}: one value a run" if alone else ""
        )
        raise DataError(
            f"{label}: the model's inputs take different numbers of samples a run ({listing}): give feeds, what the model takes in one run."
        )
    return batch


def _of_feeds(feeds: Sequence[Feed], inputs: Sequence[ValueInfoProto], label: str) -> Samples:
    """Every feed is a sample: it is what the model takes in one run, and never cut up."""
    columns: dict[str, list[NDArray[np.generic]]] = {i.name: [] for i in inputs}
    for k, feed in enumerate(feeds):
        where = f"{label}, feed {k}"
        _check_names(feed, inputs, where)
        for info in inputs:
            value = np.asarray(feed[info.name])
            dims = _symbols(info)
            _check_values(value, info, where)
            if dims is not None and not fits(value.shape, dims):
                wanted = ", ".join(str(d) if isinstance(d, int) else "any" for d in dims)
                raise DataError(
                    f"{where}: input {info.name!r} has shape {value.shape}, but the model wants ({wanted}) in one run."
                )
            columns[info.name].append(value)
    signs = {i.name: _symbols(i) for i in inputs}
    axes = batch_axes(signs, {})[0]
    batches = [
        [v.shape[axes[n] or 0] for v in values]
        for n, values in columns.items()
        if is_batch(signs[n], axes[n])
    ]
    rows = min((int(np.median(sizes)) for sizes in batches), default=1)
    return Samples({name: Column(values) for name, values in columns.items()}, 1, rows=max(rows, 1))


def _checked_axes(given: Axes, dims: Mapping[str, Sequence[Symbol] | None]) -> Axes:
    for name, axis in given.items():
        if name not in dims:
            raise DataError(
                f"batch axis of {name!r}: the model has no such input (it has: {', '.join(map(repr, dims))})."
            )
        rank = dims[name]
        if axis is not None and rank is not None and not 0 <= axis < len(rank):
            raise DataError(
                f"batch axis {axis} of {name!r}: the input has {len(rank)} axes; count from 0, or say none."
            )
    return given


def _check_names(given: Mapping[str, object], inputs: Sequence[ValueInfoProto], label: str) -> None:
    missing = [i.name for i in inputs if i.name not in given]
    if missing:
        raise DataError(
            f"{label} has no array for the model input {missing[0]!r} (it has: {', '.join(map(repr, given)) or 'none'})."
        )
    unknown = [name for name in given if name not in {i.name for i in inputs}]
    if unknown:
        raise DataError(
            f"{label} has an array {unknown[0]!r}, but the model has no such input (it has: {_names(inputs)})."
        )


def _checked(
    given: NDArray[np.generic] | Sequence[NDArray[np.generic]], info: ValueInfoProto, label: str
) -> Values:
    """The array, or one array a sample, after the check of types and values."""
    array = given if isinstance(given, list) else np.asarray(given)
    if isinstance(array, np.ndarray) and (
        array.dtype.kind != "O" or info.type.tensor_type.elem_type == TensorProto.STRING
    ):
        _check_values(array, info, label)
        return array
    values = [np.asarray(v) for v in given]
    for k, value in enumerate(values):
        _check_values(value, info, f"{label}, sample {k}")
    alike = values and len({v.shape for v in values}) == 1
    return np.stack(values) if alike else values


def expected(
    model: ModelProto, count: int, size: int
) -> dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]]:
    """Shape and type of the array of every model input, for ``count`` samples, with open dimensions of
    ``size``.

    Dimensions of the same name get the same size because all get one; the batch axis goes to the front.
    """
    inputs = _inputs(model)
    axes = batch_axes({i.name: _symbols(i) for i in inputs}, {})[0]
    result = {}
    for info in inputs:
        axis = axes[info.name]
        sizes = [d if isinstance(d, int) else size for d in _symbols(info) or []]
        if axis is not None:
            sizes = [count, *sizes[:axis], *sizes[axis + 1 :]]
        result[info.name] = (
            tuple(sizes),
            np.dtype(helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)),
        )
    return result


def _inputs(model: ModelProto) -> list[ValueInfoProto]:
    constants = {t.name for t in model.graph.initializer}
    return [i for i in model.graph.input if i.name not in constants]


def _names(inputs: Sequence[object]) -> str:
    return ", ".join(repr(i.name) for i in inputs)  # type: ignore[attr-defined]


def _symbols(info: object) -> list[Symbol] | None:
    tensor = info.type.tensor_type  # type: ignore[attr-defined]
    if not tensor.HasField("shape"):
        return None
    return [
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param or None
        for d in tensor.shape.dim
    ]


def _check_values(array: NDArray[np.generic], info: ValueInfoProto, label: str) -> None:
    """Raise unless type and values are what the model takes."""
    elem_type, name = info.type.tensor_type.elem_type, info.name
    if elem_type == TensorProto.STRING:
        if array.dtype.kind not in "OSU":
            raise DataError(f"{label}: input {name!r} has type {array.dtype}, but the model wants strings.")
        return
    expected = (
        helper.tensor_dtype_to_np_dtype(elem_type) if elem_type != TensorProto.UNDEFINED else array.dtype
    )
    if array.dtype != expected:
        raise DataError(
            f"{label}: input {name!r} has type {array.dtype}, but the model wants {np.dtype(expected)}."
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        rows = array.reshape(len(array), -1) if array.ndim else array.reshape(1, 1)
        bad = int(np.argwhere(~np.isfinite(rows).all(axis=1))[0, 0])
        where = "" if "sample" in label or "feed" in label else f" in sample {bad}"
        raise DataError(f"{label}: input {name!r} has NaN or Inf{where}.")
