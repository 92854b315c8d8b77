"""Arrays of any library as numpy arrays, without importing the library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.data.inputs import Input
from eptq_onnx.errors import DataError, one_line

_PLAIN = (list, tuple, int, float, bool)


def is_tensor(value: object) -> bool:
    """Return True for arrays and tensors: what has a shape and a type."""
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, Mapping)


def as_array(value: Any, label: str, info: Input | None = None) -> NDArray[Any]:
    """Return an array, a tensor, nested lists or a number as an array.

    Parameters
    ----------
    value : array-like
        Tensors of torch, TensorFlow, JAX and onnxruntime among others.
    label : str
        What it is, for messages.
    info : Input, optional
        What it is for; lists and numbers, which have no type of their own, get the input's.

    Raises
    ------
    DataError
        If it is no array, or a ragged list.
    """
    try:
        array = _converted(value)
    except Exception as e:
        # Conversions are those of other libraries.
        raise DataError(f"{label} is a {type(value).__name__} that is no array: {one_line(e, 150)}.") from e
    wanted = None if info is None else info.dtype
    typeless = isinstance(value, _PLAIN) and not any(
        map(is_tensor, value if isinstance(value, (list, tuple)) else ())
    )
    if typeless and wanted is not None and np.can_cast(array.dtype, wanted, "same_kind"):
        return array.astype(wanted)
    return array


def _converted(value: Any) -> NDArray[Any]:
    if isinstance(value, np.ndarray):
        return value
    for step in ("detach", "cpu"):  # out of a gradient graph and an accelerator of torch
        method = getattr(value, step, None)
        value = method() if callable(method) else value
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":  # numpy has no such type
        value = value.float()
    method = getattr(value, "numpy", None)
    return np.asarray(method() if callable(method) else value)
