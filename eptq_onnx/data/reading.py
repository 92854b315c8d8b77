"""Read calibration data, check it against the model, and determine the batch axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from eptq_onnx.data.layouts import Axes, Column, Symbol, Values, along, batch_axes, fits, is_batch, readings
from eptq_onnx.data.readers import Feed, Source, open_source
from eptq_onnx.data.samples import Samples
from eptq_onnx.errors import DataError


def read(source: Source, model: ModelProto, given: Axes | None = None) -> Samples:
    """Return the most likely interpretation of calibration data; see `candidates`."""
    return candidates(source, model, given)[0]


def candidates(source: Source, model: ModelProto, given: Axes | None = None) -> list[Samples]:
    """Read calibration data and check that it fits the model.

    Parameters
    ----------
    source : Source
        Arrays, feeds, files, or a function that returns them; see `eptq_onnx.data.readers.open_source`.
    model : ModelProto
    given : mapping of str to int or None, optional
        The batch axes of some inputs; None for inputs without one.

    Returns
    -------
    list of Samples
        Possible interpretations of the data, most likely first.

    Raises
    ------
    DataError
        If data is missing or unreadable, or has the wrong name, shape, type or value.
    """
    inputs = _inputs(model)
    if not inputs:
        raise DataError("the model has no input to feed calibration data to.")
    dims = {i.name: _symbols(i) for i in inputs}
    given = _checked_axes(given or {}, dims)
    data, label = open_source(source)
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
    """Return the samples if batches lie along these axes."""
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
    samples = Samples(columns, _prescribed(columns, dims, label))
    batch = samples.fixed_batch
    if batch is not None and next(samples.parts(range(samples.count), batch), None) is None:
        alike = len(samples.alike())
        raise DataError(
            f"{label} has {alike} samples{' of one size' * (alike < samples.count)}, "
            f"but the model takes {batch} at a time: give at least {batch}."
        )
    return samples


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


def _of_feeds(feeds: Sequence[Feed], inputs: Sequence[ValueInfoProto], label: str) -> Samples:
    """Return one sample per feed; a feed is what the model takes in one run and is never split."""
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
                    f"{where}: input {info.name!r} has shape {value.shape}, "
                    f"but the model wants ({wanted}) in one run."
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
        known = ", ".join(map(repr, given)) or "none"
        raise DataError(f"{label} has no array for the model input {missing[0]!r} (it has: {known}).")
    unknown = [name for name in given if name not in {i.name for i in inputs}]
    if unknown:
        raise DataError(
            f"{label} has an array {unknown[0]!r}, "
            f"but the model has no such input (it has: {_names(inputs)})."
        )


def _checked(
    given: NDArray[np.generic] | Sequence[NDArray[np.generic]], info: ValueInfoProto, label: str
) -> Values:
    """Return the array, or one array per sample, with types and values checked."""
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
    """Return shape and type of every model input's array for ``count`` samples.

    Open dimensions get ``size``, so dimensions of the same name agree. The batch axis goes first.
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
    """Check that type and values are what the model takes."""
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
