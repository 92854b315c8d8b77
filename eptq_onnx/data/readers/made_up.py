"""Reader that makes samples up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx.data.inputs import Input, plausible
from eptq_onnx.data.layouts import batch_axes
from eptq_onnx.data.origin import Origin
from eptq_onnx.data.readers.base import Opened, Reader, Request
from eptq_onnx.errors import DataError

_COUNT = 32
"""Samples that are made up if nobody says how many."""


class RandomReader(Reader):
    """Draws samples at random, where there are none: what comes out runs, and nothing else is known of it."""

    form = "random: inputs that are made up, to try size and speed; figures of accuracy then mean nothing"
    order = 28

    def takes(self, source: Any) -> bool:
        """Return True for the word, unless a file has that name."""
        return isinstance(source, str) and source == "random" and not Path(source).exists()

    def open(self, source: Any, request: Request) -> Opened:
        """Return drawn arrays, the same in every run."""
        dims = {i.name: i.dims for i in request.inputs}
        axes = batch_axes(dims, {})[0]
        random, named = np.random.default_rng(0), dict[str, int]()
        shapes: dict[str, tuple[int, ...]] = {}
        count = request.reading.samples or _COUNT
        for info in request.inputs:
            axis = axes[info.name]
            shape = plausible(info.dims or (), named)
            if axis is not None and info.dims:
                count = max(count, 2 * shape[axis] if isinstance(info.dims[axis], int) else 0)
                shape = (-1, *shape[:axis], *shape[axis + 1 :])
            shapes[info.name] = shape
        content = {
            info.name: _drawn(info, [count if s < 0 else s for s in shapes[info.name]], request.model, random)
            for info in request.inputs
        }
        return Opened(content, Origin("random numbers", made_up=True))

    def files(self, source: Any) -> list[tuple[str, Path]]:
        """Return nothing: no file is read."""
        return []


def _drawn(info: Input, shape: list[int], model: ModelProto, random: np.random.Generator) -> NDArray[Any]:
    """Return normal floats, numbers of rows of the tables that are looked up in, colours, or ones."""
    if info.dtype is None or info.dtype.kind not in "fiub" or info.dims is None:
        raise DataError(f"nothing can be made up for the input {info}: give samples with --data.")
    if info.dtype.kind == "f":
        return random.standard_normal(shape).astype(info.dtype)
    rows = _rows(model, info.name)
    if rows:
        return random.integers(0, rows, shape).astype(info.dtype)
    if info.dtype.itemsize == 1 and info.dtype.kind in "iu" and len(shape) >= 3:
        limits = np.iinfo(info.dtype)
        return random.integers(limits.min, limits.max, shape, endpoint=True).astype(info.dtype)
    return np.ones(shape, info.dtype)


def _rows(model: ModelProto, name: str) -> int:
    """Return the rows of the smallest constant table that an input looks up in; 0 if there is none."""
    sizes = {t.name: t.dims for t in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type == "Cast" and name in node.input:
            name = node.output[0]
        if node.op_type == "Gather" and node.input[1] == name and node.input[0] in sizes:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
            found.append(sizes[node.input[0]][axis])
    return min(found, default=0)
