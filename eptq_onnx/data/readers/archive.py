"""Reader of files written by numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eptq_onnx.data import archives
from eptq_onnx.data.layouts import Dims, batch_axes
from eptq_onnx.data.origin import Origin
from eptq_onnx.data.readers.base import Opened, Reader, Request, Wanted, is_path


class ArchiveReader(Reader):
    """Reads a .npz (a mapping) or a .npy (an array); see `eptq_onnx.data.archives`."""

    form = (
        "a .npz file with one array for each model input, samples along the first axis, "
        "or a .npy file for a model with one input"
    )
    order = 90  # anything left is a file name, or reported as a missing file

    def takes(self, source: Any) -> bool:
        """Return True for all paths."""
        return is_path(source)

    def open(self, source: Any, request: Request) -> Opened:
        """Return all arrays of the file."""
        path = Path(source)
        return Opened(archives.read_file(path), Origin(str(path)))

    def wanted(self, request: Request) -> Wanted:
        """Return arrays, which every model takes."""
        axes = batch_axes({i.name: i.dims for i in request.inputs}, {})[0]
        shapes = [f"{i.name!r} {i.dtype or 'text'} {_stacked(i.dims, axes[i.name])}" for i in request.inputs]
        return Wanted(f"arrays: {'; '.join(shapes)}", ("--data", "samples.npz"))


def _stacked(dims: Dims, axis: int | None) -> str:
    """Return the shape of an array with samples in front."""
    if dims is None:
        return "of any shape"
    rest = [d for k, d in enumerate(dims) if k != axis]
    return f"({', '.join(['samples', *(str(d) if isinstance(d, int) else 'any' for d in rest)])})"
