"""Calibration data: reading, checking against the model, batching."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from eptq_onnx.errors import DataError
from eptq_onnx.types import Feeds

Source = str | os.PathLike[str] | Mapping[str, NDArray[np.generic]] | NDArray[np.generic]


class Samples:
    """Calibration samples that fit a model.

    Parameters
    ----------
    arrays : mapping of str to ndarray
        One array per model input, samples along the first axis.
    fixed_batch : int or None
        Batch size that the model's inputs prescribe.
    """

    def __init__(self, arrays: Mapping[str, NDArray[np.generic]], fixed_batch: int | None) -> None:
        self._arrays = dict(arrays)
        self.fixed_batch = fixed_batch
        self.count = len(next(iter(self._arrays.values())))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model inputs."""
        return tuple(self._arrays)

    def micro_batch(self, wanted: int) -> int:
        """Samples that one run of the model takes: what the model prescribes, else at most ``wanted``."""
        return self.fixed_batch or max(1, min(wanted, self.count))

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Feeds:
        """The samples at ``indices`` as one batch."""
        return {name: np.ascontiguousarray(a[indices]) for name, a in self._arrays.items()}

    def shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Input shapes of a batch."""
        return {name: (batch, *a.shape[1:]) for name, a in self._arrays.items()}

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
    inputs = [i for i in model.graph.input if i.name not in {t.name for t in model.graph.initializer}]
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
    checked, batch = {}, None
    for info in inputs:
        array = np.asarray(arrays[info.name])
        dims = _dims(info)
        _check_array(array, info.name, info.type.tensor_type.elem_type, dims, label)
        if dims and dims[0] is not None:
            batch = dims[0]
        checked[info.name] = array
    counts = {name: len(a) for name, a in checked.items()}
    if len(set(counts.values())) > 1:
        raise DataError(f"{label} has different numbers of samples: {', '.join(f'{n}: {c}' for n, c in counts.items())}.")
    count = next(iter(counts.values()))
    if count == 0:
        raise DataError(f"{label} has no samples.")
    if batch is not None and count < batch:
        raise DataError(f"{label} has {count} samples, but the model takes {batch} at a time: give at least {batch}.")
    return Samples(checked, batch)


def _names(inputs: Sequence[object]) -> str:
    return ", ".join(repr(i.name) for i in inputs)  # type: ignore[attr-defined]


def _dims(info: object) -> list[int | None] | None:
    tensor = info.type.tensor_type  # type: ignore[attr-defined]
    if not tensor.HasField("shape"):
        return None
    return [int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else None for d in tensor.shape.dim]


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


def _check_array(array: NDArray[np.generic], name: str, elem_type: int, dims: list[int | None] | None, label: str) -> None:
    expected = helper.tensor_dtype_to_np_dtype(elem_type) if elem_type != TensorProto.UNDEFINED else array.dtype
    if array.dtype != expected:
        raise DataError(f"{label}: input {name!r} has type {array.dtype}, but the model wants {np.dtype(expected)}.")
    if dims is not None:
        wanted = ["samples", *("any" if d is None else str(d) for d in dims[1:])]
        fits = len(array.shape) == len(dims) and all(d is None or s == d for s, d in zip(array.shape[1:], dims[1:], strict=False))
        if not fits or not dims:
            raise DataError(f"{label}: input {name!r} has shape {array.shape}, but the model wants ({', '.join(wanted)}).")
    elif array.ndim == 0:
        raise DataError(f"{label}: input {name!r} is a scalar: samples go along the first axis.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(np.argwhere(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))[0, 0])
        raise DataError(f"{label}: input {name!r} has NaN or Inf in sample {bad}.")
