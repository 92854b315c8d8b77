"""Calibration data: reading, checking against the model, batching."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from eptq_onnx.errors import DataError
from eptq_onnx.types import Feeds

Source = str | os.PathLike[str] | Mapping[str, NDArray[np.generic]] | NDArray[np.generic]

_MICRO_BATCH = 4


class Samples:
    """Calibration samples that fit a model.

    Parameters
    ----------
    arrays : mapping of str to ndarray
        One array per model input, samples along the first axis; without samples for an input that has no batch axis.
    fixed_batch : int or None
        Batch size that the model's inputs prescribe.
    axes : mapping of str to int or None, optional
        Batch axis of each model input, None for an input without one (a sampling rate, say). By default 0.
    """

    def __init__(
        self, arrays: Mapping[str, NDArray[np.generic]], fixed_batch: int | None, axes: Mapping[str, int | None] | None = None
    ) -> None:
        self._arrays, self._axes = dict(arrays), dict(axes) if axes is not None else dict.fromkeys(arrays, 0)
        self.fixed_batch = fixed_batch
        self.count = next(len(a) for name, a in self._arrays.items() if self._axes[name] is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model inputs."""
        return tuple(self._arrays)

    def has_samples(self, name: str) -> bool:
        """False for an input without a batch axis: it has one value for all samples."""
        return self._axes[name] is not None

    def micro_batch(self, wanted: int | None = None) -> int:
        """Samples that one run of the model takes: what the model prescribes, else at most ``wanted``, and few.

        Small batches run side by side (`eptq_onnx.parallel`) and cost no more a sample than large ones.
        """
        return self.fixed_batch or max(1, min(wanted or _MICRO_BATCH, _MICRO_BATCH, self.count))

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Feeds:
        """The samples at ``indices`` as one batch."""
        feeds: Feeds = {}
        for name, array in self._arrays.items():
            axis = self._axes[name]
            feeds[name] = np.ascontiguousarray(np.moveaxis(array[indices], 0, axis)) if axis is not None else array
        return feeds

    def two_batches(self, size: int) -> tuple[Feeds, Feeds]:
        """Batches of the first and of the last samples, repeated where there are fewer."""
        first = np.arange(size) % self.count
        return self.take(first), self.take(self.count - 1 - first)

    def shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Input shapes of a batch."""
        shapes = {}
        for name, array in self._arrays.items():
            axis = self._axes[name]
            rest = array.shape[1:]
            shapes[name] = (*rest[:axis], batch, *rest[axis:]) if axis is not None else array.shape
        return shapes

    def batches(self, indices: Sequence[int] | NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
        """Split sample indices into batches; the last is short, or left out if the model prescribes the size."""
        chosen = np.asarray(indices, np.int64)
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            if len(part) == size or self.fixed_batch is None:
                yield part


def spread(count: int, limit: int) -> NDArray[np.int64]:
    """At most ``limit`` of ``count`` places, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64))


def read(source: Source, model: ModelProto) -> Samples:
    """Read calibration data and check that it fits the model.

    Parameters
    ----------
    source : path of a .npz file, mapping of arrays, or a single array for a model with one input
    model : ModelProto

    Raises
    ------
    DataError
        If data is missing, unreadable, or of the wrong name, shape, type or value.
    """
    inputs = _inputs(model)
    if not inputs:
        raise DataError("the model has no input to feed calibration data to.")
    if isinstance(source, np.ndarray):
        if len(inputs) != 1:
            raise DataError(f"the model has {len(inputs)} inputs ({_names(inputs)}): give a mapping from name to array.")
        arrays: Mapping[str, NDArray[np.generic]] = {inputs[0].name: source}
        label = "the calibration data"
    elif isinstance(source, Mapping):
        arrays, label = source, "the calibration data"
    else:
        arrays, label = _read_npz(Path(source)), str(source)
    missing = [i.name for i in inputs if i.name not in arrays]
    if missing:
        raise DataError(f"{label} has no array for the model input {missing[0]!r} (it has: {', '.join(map(repr, arrays)) or 'none'}).")
    unknown = [name for name in arrays if name not in {i.name for i in inputs}]
    if unknown:
        raise DataError(f"{label} has an array {unknown[0]!r}, but the model has no such input (it has: {_names(inputs)}).")
    axes, batch = _batch_axes([_symbols(i) for i in inputs])
    checked = {}
    for info, axis in zip(inputs, axes, strict=True):
        array = np.asarray(arrays[info.name])
        _check_array(array, info.name, info.type.tensor_type.elem_type, _symbols(info), axis, label)
        checked[info.name] = array
    named = {i.name: axis for i, axis in zip(inputs, axes, strict=True)}
    counts = {name: len(a) for name, a in checked.items() if named[name] is not None}
    if not counts:
        raise DataError("no input of the model has a batch axis: there is nothing to calibrate with.")
    if len(set(counts.values())) > 1:
        raise DataError(f"{label} has different numbers of samples: {', '.join(f'{n}: {c}' for n, c in counts.items())}.")
    count = next(iter(counts.values()))
    if count == 0:
        raise DataError(f"{label} has no samples.")
    if batch is not None and count < batch:
        raise DataError(f"{label} has {count} samples, but the model takes {batch} at a time: give at least {batch}.")
    return Samples(checked, batch, named)


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


def _read_npz(path: Path) -> dict[str, NDArray[np.generic]]:
    if not path.is_file():
        raise DataError(f"data file {path} does not exist.")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise DataError(f"data file {path} holds a single array: store it with numpy.savez, under the name of the model input.")
        with loaded as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, BadZipFile) as e:
        raise DataError(f"data file {path} is not a readable .npz file: {e}.") from e


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
