"""Reader of items in memory, or that come one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eptq_onnx.data.items import Unit, gathered
from eptq_onnx.data.readers.base import Opened, Reader, Request, is_path
from eptq_onnx.errors import DataError


class FeedReader(Reader):
    """Reads an iterable of mappings from input name to array, of tuples or of arrays."""

    form = (
        "an iterable, such as a generator, of feeds (each a mapping from input names to what the model takes "
        "in one run), of samples or batches, or of tuples of these with labels behind them"
    )
    on_command_line = False
    order = 20

    def takes(self, source: Any) -> bool:
        """Return True for everything that is not a path."""
        return not is_path(source)

    def open(self, source: Any, request: Request) -> Opened:
        """Return all items; those that come one by one are not held in memory."""
        if isinstance(source, Sequence):
            items = [source[k] for k in request.chosen(len(source))]
            return gathered(items, request, named=Unit.RUN, streamed=False)
        try:
            items = iter(source)
        except TypeError as e:
            raise DataError(
                f"the calibration data is a {type(source).__name__}, from which nothing can be read: give "
                "arrays, feeds, a loader or the path of files."
            ) from e
        return gathered(items, request, named=Unit.RUN, streamed=True)

    def files(self, source: Any) -> list[tuple[str, Path]]:
        """Return nothing: the files behind feeds, if any, are unknown."""
        return []
