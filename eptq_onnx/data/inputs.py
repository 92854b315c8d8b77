"""What the inputs of a model take: names, sizes, types, and whether an array fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from eptq_onnx.data.layouts import Symbol, batch_axes
from eptq_onnx.errors import DataError

_BATCH, _PIXELS, _LENGTH = 1, 224, 128
"""Plausible sizes of open axes: the first axis, the last two axes of an image, any other axis."""
_CHUNK = 2**22
"""Elements that are checked at once."""


@dataclass(frozen=True)
class Input:
    """An input of a model that is fed.

    Parameters
    ----------
    name : str
    dims : tuple of int, str or None, or None
        Size of each axis; None for an unknown rank.
    elem_type : int
        Element type, as `onnx.TensorProto.DataType`.
    """

    name: str
    dims: tuple[Symbol, ...] | None
    elem_type: int

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """Return the type of arrays; None if the model does not state it or takes text."""
        if self.elem_type in (TensorProto.STRING, TensorProto.UNDEFINED):
            return None
        return np.dtype(helper.tensor_dtype_to_np_dtype(self.elem_type))

    def __str__(self) -> str:
        kind = "text" if self.elem_type == TensorProto.STRING else self.dtype or "any type"
        return f"{self.name!r} {kind} {sizes_text(self.dims)}"


def inputs_of(model: ModelProto) -> tuple[Input, ...]:
    """Return the inputs that need values: those that are no initializers."""
    constants = {t.name for t in model.graph.initializer}
    return tuple(
        Input(i.name, _dims(i.type.tensor_type), i.type.tensor_type.elem_type)
        for i in model.graph.input
        if i.name not in constants
    )


def sizes_text(dims: Sequence[Symbol] | None) -> str:
    """Return sizes as ``(any, 3, 224, 224)``."""
    if dims is None:
        return "of any shape"
    return f"({', '.join(str(d) if isinstance(d, int) else 'any' for d in dims)})"


def names(inputs: Sequence[Input]) -> str:
    """Return the names of inputs for messages."""
    return ", ".join(repr(i.name) for i in inputs)


def plausible(dims: Sequence[object], named: dict[str, int]) -> tuple[int, ...]:
    """Return a shape of these sizes; open axes get plausible ones, the same for axes of one name.

    Parameters
    ----------
    dims : sequence
        Numbers above 0, names, or anything else for open axes.
    named : dict of str to int
        Sizes of the names so far; new ones are added.
    """
    sizes = []
    for axis, size in enumerate(dims):
        if isinstance(size, int) and size > 0:
            sizes.append(size)
            continue
        image = len(dims) == 4 and axis >= 2
        chosen = _BATCH if axis == 0 else _PIXELS if image else _LENGTH
        sizes.append(named.setdefault(size, chosen) if isinstance(size, str) and size else chosen)
    return tuple(sizes)


def expected(
    model: ModelProto, count: int, size: int
) -> dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]]:
    """Return shape and type of every model input's array for ``count`` samples.

    Open dimensions get ``size``, so dimensions of the same name agree. The batch axis goes first.
    """
    inputs = inputs_of(model)
    axes = batch_axes({i.name: i.dims for i in inputs}, {})[0]
    result = {}
    for info in inputs:
        axis = axes[info.name]
        sizes = [d if isinstance(d, int) else size for d in info.dims or []]
        if axis is not None:
            sizes = [count, *sizes[:axis], *sizes[axis + 1 :]]
        result[info.name] = (tuple(sizes), np.dtype(helper.tensor_dtype_to_np_dtype(info.elem_type)))
    return result


def check_names(given: Mapping[str, object], inputs: Sequence[Input], label: str) -> None:
    """Check that there is an array for every input, and no other.

    Raises
    ------
    DataError
    """
    missing = [i for i in inputs if i.name not in given]
    if missing:
        known = ", ".join(map(repr, given)) or "none"
        raise DataError(
            f"{label} has no array for the model input {missing[0].name!r} (it has: {known}); "
            f"the model takes {'; '.join(map(str, inputs))}."
        )
    unknown = [name for name in given if name not in {i.name for i in inputs}]
    if unknown:
        raise DataError(
            f"{label} has an array {unknown[0]!r}, but the model has no such input (it has: {names(inputs)})."
        )


def check_values(array: NDArray[np.generic], info: Input, label: str) -> None:
    """Check that type and values are what the model takes.

    Raises
    ------
    DataError
    """
    if info.elem_type == TensorProto.STRING:
        if array.dtype.kind not in "OSU":
            raise DataError(
                f"{label}: input {info.name!r} has type {array.dtype}, but the model wants strings."
            )
        return
    wanted = info.dtype or array.dtype
    if array.dtype != wanted:
        raise DataError(f"{label}: input {info.name!r} has type {array.dtype}, but the model wants {wanted}.")
    if array.dtype.kind != "f":
        return
    rows = array.reshape(len(array), -1) if array.ndim and array.size else array.reshape(1, -1)
    step = max(1, _CHUNK // max(rows.shape[1], 1))
    for start in range(0, len(rows), step):
        finite = np.isfinite(rows[start : start + step]).all(axis=1)
        if not finite.all():
            bad = start + int(np.argmin(finite))
            where = "" if "sample" in label or "feed" in label else f" in sample {bad}"
            raise DataError(f"{label}: input {info.name!r} has NaN or Inf{where}.")


def _dims(tensor: TensorProto) -> tuple[Symbol, ...] | None:
    if not tensor.HasField("shape"):
        return None
    return tuple(
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else d.dim_param or None
        for d in tensor.shape.dim
    )
