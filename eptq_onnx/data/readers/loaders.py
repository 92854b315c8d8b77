"""Readers of what other libraries train and calibrate with: loaders, data sets, calibration readers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eptq_onnx.data.items import Unit, gathered
from eptq_onnx.data.readers.base import Opened, Reader, Request


class _Foreign(Reader):
    """Reads an object of another library, which is recognised by its attributes."""

    on_command_line = False

    def files(self, source: Any) -> list[tuple[str, Path]]:
        """Return nothing: the files behind it, if any, are unknown."""
        return []


class CalibrationReader(_Foreign):
    """Reads onnxruntime's CalibrationDataReader."""

    form = "onnxruntime's CalibrationDataReader"
    order = 12

    def takes(self, source: Any) -> bool:
        """Return True for objects with a method ``get_next``."""
        return callable(getattr(source, "get_next", None))

    def open(self, source: Any, request: Request) -> Opened:
        """Return its feeds, one by one."""
        return gathered(iter(source.get_next, None), request, named=Unit.RUN, streamed=True)


class LoaderReader(_Foreign):
    """Reads a loader of batches: torch's DataLoader and its like, TensorFlow's data sets."""

    form = (
        "a DataLoader of torch or a data set of TensorFlow, of tensors, tuples or dicts; what the model has "
        "no input for, such as labels, is left out"
    )
    order = 14

    def takes(self, source: Any) -> bool:
        """Return True for iterables with a batch size or TensorFlow's ``element_spec``."""
        return hasattr(source, "__iter__") and (
            hasattr(source, "element_spec") or (hasattr(source, "batch_size") and hasattr(source, "dataset"))
        )

    def open(self, source: Any, request: Request) -> Opened:
        """Return the samples of its batches, one by one."""
        return gathered(source, request, named=Unit.BATCH, streamed=True)


class DatasetReader(_Foreign):
    """Reads a Dataset of Hugging Face, or another sequence of samples."""

    form = (
        "a Dataset of Hugging Face datasets or of torch, each row a sample; columns that are no inputs are "
        "left out"
    )
    order = 16

    def takes(self, source: Any) -> bool:
        """Return True for objects with columns, and for those that are indexed but are no sequences."""
        return hasattr(source, "column_names") or (
            not isinstance(source, (str, bytes, list, tuple))
            and hasattr(source, "__getitem__")
            and hasattr(source, "__len__")
            and not hasattr(source, "__iter__")
        )

    def open(self, source: Any, request: Request) -> Opened:
        """Return its rows, one by one."""
        rows = _rows(source, request) if hasattr(source, "__len__") else iter(source)
        return gathered(rows, request, named=Unit.BATCH, streamed=True)


def _rows(source: Any, request: Request) -> Iterator[Any]:
    """Yield the chosen rows."""
    return (source[k] for k in request.chosen(len(source)))
