"""Read calibration data, check it against the model, and determine the batch axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from eptq_onnx.config.reading import Reading
from eptq_onnx.data.inputs import Input, check_names, check_values, inputs_of, names, sizes_text
from eptq_onnx.data.layouts import Axes, Column, Symbol, Values, along, batch_axes, fits, is_batch, readings
from eptq_onnx.data.origin import Origin
from eptq_onnx.data.placing import Placed
from eptq_onnx.data.readers import Feed, Opened, Request, Source, open_source
from eptq_onnx.data.samples import Samples, spread
from eptq_onnx.errors import DataError


@dataclass(frozen=True)
class Candidates:
    """Possible interpretations of calibration data.

    Parameters
    ----------
    samples : tuple of Samples
        Most likely first.
    origin : Origin
        Where the data comes from, and what was done to it.
    names : tuple of str
        Names of the samples, if each is a file.
    placed : tuple of Placed
        Where pictures lie in the samples, if they are some.
    """

    samples: tuple[Samples, ...]
    origin: Origin
    names: tuple[str, ...] = ()
    placed: tuple[Placed, ...] = ()

    def name_of(self, number: int) -> str:
        """Return the name of a sample, or its number if it has none."""
        return self.names[number] if self.names else str(number)

    def placed_of(self, number: int) -> Placed | None:
        """Return where a picture lies in a sample; None if it is not known to be one."""
        return self.placed[number] if self.placed else None


def read(source: Source, model: ModelProto, given: Axes | None = None) -> Samples:
    """Return the most likely interpretation of calibration data; see `load`."""
    return load(source, model, given).samples[0]


def load(source: Source, model: ModelProto, given: Axes | None = None) -> Candidates:
    """Read calibration data and check that it fits the model.

    Parameters
    ----------
    source : Source
        See `eptq_onnx.data.readers.open_source`.
    model : ModelProto
    given : mapping of str to int or None, optional
        The batch axes of some inputs; None for inputs without one.

    Raises
    ------
    DataError
        If data is missing or unreadable, or has the wrong name, shape, type or value.
    """
    inputs = inputs_of(model)
    if not inputs:
        raise DataError("the model has no input to feed calibration data to.")
    given = _checked_axes(given or {}, {i.name: i.dims for i in inputs})
    opened = _named(open_source(source, Request(model, inputs, Reading())), inputs)
    label, content, limit = opened.origin.label, opened.content, opened.limit
    if not isinstance(content, Mapping):
        feeds = [content[int(k)] for k in spread(len(content), limit or len(content))]
        return Candidates((_of_feeds(feeds, inputs, label),), opened.origin)
    check_names(content, inputs, label)
    values = {i.name: _checked(content[i.name], i, label) for i in inputs}
    found = tuple(_interpretations(values, inputs, given, label, limit))
    count = found[0].count
    names = opened.names if count == len(opened.names) else ()
    return Candidates(found, opened.origin, names, opened.placed if count == len(opened.placed) else ())


def _named(opened: Opened, inputs: Sequence[Input]) -> Opened:
    """Return the content by input: what has no name, or another one, belongs to a model's only input."""
    content, origin = opened.content, opened.origin
    if isinstance(content, np.ndarray):
        if len(inputs) != 1:
            raise DataError(
                f"the model has {len(inputs)} inputs ({names(inputs)}): give a mapping from name to array."
            )
        return replace(opened, content={inputs[0].name: content})
    feeds = [content] if isinstance(content, Mapping) else content
    other = {name for feed in feeds for name in feed}
    if len(inputs) != 1 or len(other) != 1 or inputs[0].name in other:
        return opened
    [name] = other
    own = inputs[0].name
    note = f"the array {name!r} was taken for the model's only input, {own!r}"
    return replace(
        opened,
        content={own: content[name]} if isinstance(content, Mapping) else [{own: f[name]} for f in content],
        origin=replace(origin, notes=(*origin.notes, note)),
    )


def _interpretations(
    values: Mapping[str, Values], inputs: Sequence[Input], given: Axes, label: str, limit: int | None
) -> list[Samples]:
    """Return the possible interpretations of arrays, most likely first."""
    dims = {i.name: i.dims for i in inputs}
    found: list[Samples] = []
    errors: list[DataError] = []
    for axes in batch_axes(dims, given):
        try:
            found.append(_arranged(values, inputs, axes, given, (label, limit)))
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
    inputs: Sequence[Input],
    axes: Axes,
    given: Axes,
    told: tuple[str, int | None],
) -> Samples:
    """Return the samples if batches lie along these axes; ``told``: name of the data, most samples."""
    label, limit = told
    dims = {i.name: i.dims for i in inputs}
    signs = {name: (dims[name] or (None,))[axis] for name, axis in axes.items() if axis is not None}
    # An axis with the batch's name, or an open axis without a name, does not belong to one value for all
    # samples.
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
        # Each array is what one run takes.
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
    if limit is not None and limit < first:
        columns = {name: _thinned(c, spread(first, limit)) for name, c in columns.items()}
    samples = Samples(columns, _prescribed(columns, dims, label))
    batch = samples.fixed_batch
    if batch is not None and next(samples.parts(range(samples.count), batch), None) is None:
        alike = len(samples.alike())
        raise DataError(
            f"{label} has {alike} samples{' of one size' * (alike < samples.count)}, "
            f"but the model takes {batch} at a time: give at least {batch}."
        )
    return samples


def _thinned(column: Column, places: NDArray[np.int64]) -> Column:
    """Return the samples at some places."""
    if column.shared:
        return column
    values = column.values
    some = values[places] if isinstance(values, np.ndarray) else [values[int(k)] for k in places]
    return replace(column, values=some)


def _shared_if_equal(column: Column) -> Column:
    """Return one shared value if all entries are equal, since that leaves the batch size open."""
    if column.shared or column.axis is not None or len(column.values) < 2:
        return column
    first, *others = column.values
    same = all(np.array_equal(first, other) for other in others)
    return Column(np.asarray(first), shared=True) if same else column


def _prescribed(
    columns: Mapping[str, Column], dims: Mapping[str, Sequence[Symbol] | None], label: str
) -> int | None:
    """Return the batch size that the model's inputs prescribe; None if they leave it open."""
    sizes = {n: (dims[n] or ())[c.axis] for n, c in columns.items() if c.axis is not None and dims[n]}
    fixed = {n: d for n, d in sizes.items() if isinstance(d, int)}
    batch = next(iter(fixed.values()), None)
    alone = next((n for n, c in columns.items() if c.axis is None and not c.shared), None)
    if len(set(fixed.values())) > 1 or (alone is not None and batch not in (None, 1)):
        listing = ", ".join(f"{n}: {d}" for n, d in fixed.items()) + (
            f", {alone}: one value per run" if alone else ""
        )
        raise DataError(
            f"{label}: the model's inputs take different numbers of samples per run ({listing}): "
            "give feeds, what the model takes in one run."
        )
    return batch


def _of_feeds(feeds: Sequence[Feed], inputs: Sequence[Input], label: str) -> Samples:
    """Return one sample per feed; a feed is what the model takes in one run and is never split."""
    columns: dict[str, list[NDArray[np.generic]]] = {i.name: [] for i in inputs}
    for k, feed in enumerate(feeds):
        where = f"{label}, feed {k}"
        check_names(feed, inputs, where)
        for info in inputs:
            value = np.asarray(feed[info.name])
            check_values(value, info, where)
            if info.dims is not None and not fits(value.shape, info.dims):
                raise DataError(
                    f"{where}: input {info.name!r} has shape {value.shape}, "
                    f"but the model wants {sizes_text(info.dims)} in one run."
                )
            columns[info.name].append(value)
    signs = {i.name: i.dims for i in inputs}
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


def _checked(given: NDArray[np.generic] | Sequence[NDArray[np.generic]], info: Input, label: str) -> Values:
    """Return the array, or one array per sample, with types and values checked."""
    array = given if isinstance(given, list) else np.asarray(given)
    if isinstance(array, np.ndarray) and (array.dtype.kind != "O" or info.elem_type == TensorProto.STRING):
        check_values(array, info, label)
        return array
    values = [np.asarray(v) for v in given]
    for k, value in enumerate(values):
        check_values(value, info, f"{label}, sample {k}")
    alike = values and len({v.shape for v in values}) == 1
    return np.stack(values) if alike else values
