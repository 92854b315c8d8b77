"""Interpret the axes of calibration arrays: samples, one run, or one value for all runs.

Only shapes are looked at, not values. An input's *batch axis* is the one along which a run takes several
samples. A model indicates it only by the names of its axes, and often wrongly; shapes leave a few
interpretations, ordered by likelihood, and a run decides between them (`eptq_onnx.method.arrange`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.errors import DataError

Symbol = int | str | None
"""Size of an axis: a number, a name, or unknown."""
Dims = Sequence[Symbol] | None
"""Axis sizes of an input; None for an unknown rank."""
Axes = Mapping[str, int | None]
Values = NDArray[np.generic] | list[NDArray[np.generic]]

_BATCH_NAME = re.compile(r"(^|[^a-z])(n|b|bs|bsz|batch)($|[^a-z])|batch", re.IGNORECASE)


@dataclass(frozen=True)
class Column:
    """The values of one model input.

    Parameters
    ----------
    values : ndarray or list of ndarray
        One entry per sample, along the first axis or in a list; for a shared input the value itself.
    axis : int or None
        Batch axis, which the entries lack and along which samples are stacked. None if every entry is what
        one run takes.
    shared : bool
        True if all runs take the same value.
    """

    values: Values
    axis: int | None = None
    shared: bool = False

    @property
    def count(self) -> int | None:
        """Return the number of samples; None for a shared input."""
        return None if self.shared else len(self.values)

    def __str__(self) -> str:
        if self.shared:
            return "no batch axis: one value for all samples"
        return "no batch axis: one value per run" if self.axis is None else f"batch axis {self.axis}"


def batch_axes(inputs: Mapping[str, Dims], given: Axes) -> list[dict[str, int | None]]:
    """Return the possible batch axes of all inputs, most likely first.

    Parameters
    ----------
    inputs : mapping of str to sequence of int, str or None
        Axis sizes of every model input.
    given : mapping of str to int or None
        Known batch axes of some inputs.
    """
    symbols: dict[Symbol, None] = {}
    named = [d for dims in inputs.values() for d in dims or () if isinstance(d, str)]
    symbols.update(dict.fromkeys(d for d in named if _BATCH_NAME.search(d)))
    first = next((dims[0] for dims in inputs.values() if dims), None)
    symbols[first] = None
    symbols.update(dict.fromkeys(named))
    found: list[dict[str, int | None]] = []
    for symbol in symbols:
        axes = {
            name: given[name] if name in given else _batch_axis(dims, symbol) for name, dims in inputs.items()
        }
        if any(
            dims and axes[name] is not None and not isinstance(dims[axes[name] or 0], int)
            for name, dims in inputs.items()
        ):
            # If another input has an open batch axis, a fixed size other than 1 is not the batch: three
            # numbers for all samples, for instance.
            for name, dims in inputs.items():
                if dims and name not in given and all(isinstance(d, int) for d in dims):
                    axes[name] = dims.index(1) if 1 in dims else None
        if axes not in found:
            found.append(axes)
    return found


def is_batch(dims: Dims, axis: int | None) -> bool:
    """Return True if an axis is the batch by its name, or is open, without a name, and not the only axis."""
    if not dims or axis is None:
        return False
    size = dims[axis]
    return bool(_BATCH_NAME.search(size)) if isinstance(size, str) else size is None and len(dims) > 1


def _batch_axis(dims: Dims, symbol: Symbol) -> int | None:
    """Return the axis with the batch's name or size.

    Without one, return the first axis if its size is open, else the first open axis, else 0.
    """
    if dims is None:
        return 0
    if not dims:
        return None
    same = [k for k, d in enumerate(dims) if d == symbol and symbol is not None]
    if isinstance(symbol, int):
        return next(iter(same), 0 if not isinstance(dims[0], int) else None)
    if same or not isinstance(dims[0], int):
        return next(iter(same), 0)
    return next((k for k, d in enumerate(dims) if not isinstance(d, int)), 0)


def readings(
    name: str, values: Values, dims: Dims, axis: int | None, label: str, *, batched: bool = False
) -> list[Column]:
    """Return the possible interpretations of an input's array, most likely first.

    Parameters
    ----------
    name : str
    values : ndarray or list of ndarray
    dims : sequence of int, str or None
    axis : int or None
        The input's batch axis.
    label : str
        Origin of the array, for messages.
    batched : bool
        True if the axis is known to be the batch, so that the array is not one value for all samples.

    Raises
    ------
    DataError
        If no interpretation fits.
    """
    entries = [np.shape(v) for v in values] if isinstance(values, list) else None
    shape = np.shape(values) if not isinstance(values, list) else (len(values),)
    if dims is None:
        if not shape:
            raise DataError(f"{label}: input {name!r} is a scalar: samples go along the first axis.")
        return [Column(values, 0)]
    rest = None if axis is None else [*dims[:axis], *dims[axis + 1 :]]
    found = []
    if entries is not None:
        if rest is not None and all(fits(e, rest) for e in entries):
            found.append(Column(values, axis))
        if all(fits(e, dims) for e in entries):
            found.append(_runs(values, axis))
        if not found:
            ranks = {len(e) for e in entries}
            wanted = dims if rest is None or ranks == {len(dims)} else rest
            k, odd = next((k, e) for k, e in enumerate(entries) if not fits(e, wanted))
            raise _misfit(f"{label}, sample {k}", name, odd, wanted, "")
        return found
    array = np.asarray(values)
    if rest is not None and shape and fits(shape[1:], rest):
        found.append(Column(array, axis))
    if len(shape) == len(dims) + 1 and fits(shape[1:], dims):
        found.append(_runs(array, axis))
    if fits(shape, dims) and not batched:
        found.append(Column(array, shared=True))
    if not found:
        wanted = (
            ["samples", *(dims if rest is None else rest)]
            if rest is not None or len(shape) > len(dims)
            else list(dims)
        )
        raise _misfit(
            label,
            name,
            shape,
            wanted,
            "" if rest is not None else ", the same value for all samples, or with samples in front",
        )
    return found


def along(array: NDArray[np.generic], axis: int, count: int) -> Column | None:
    """Return an array whose batch axis holds all samples as a column; None if it holds another number."""
    return (
        Column(np.moveaxis(array, axis, 0), axis)
        if array.ndim > axis and array.shape[axis] == count
        else None
    )


def _runs(values: Values, axis: int | None) -> Column:
    """Return what the model takes in each run; batches of one become samples that can be stacked."""
    if isinstance(values, list):
        if axis is not None and all(v.shape[axis] == 1 for v in values):
            return Column([np.squeeze(v, axis) for v in values], axis)
    elif axis is not None and values.shape[axis + 1] == 1:
        return Column(np.squeeze(values, axis + 1), axis)
    return Column(values)


def fits(shape: Sequence[int], dims: Dims) -> bool:
    """Return True if an input takes this shape in one run; False if the input's rank is unknown."""
    if dims is None:
        return False
    return len(shape) == len(dims) and all(
        not isinstance(d, int) or s == d for s, d in zip(shape, dims, strict=True)
    )


def _misfit(label: str, name: str, shape: Sequence[int], wanted: Sequence[Symbol], more: str) -> DataError:
    sizes = ", ".join(
        "samples" if d == "samples" and k == 0 else str(d) if isinstance(d, int) else "any"
        for k, d in enumerate(wanted)
    )
    return DataError(
        f"{label}: input {name!r} has shape {tuple(shape)}, but the model wants ({sizes}){more}."
    )
