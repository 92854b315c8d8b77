"""Reader of feeds in memory, each of which is what the model takes in one run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eptq_onnx.data.readers.base import Data, Reader, is_path
from eptq_onnx.errors import DataError


class FeedReader(Reader):
    """Reads an iterable of mappings from input name to array."""

    form = "an iterable of feeds, each a mapping from input names to arrays"
    on_command_line = False
    order = 20

    def takes(self, source: Any) -> bool:
        """Return True for everything that is not a path."""
        return not is_path(source)

    def open(self, source: Any) -> tuple[Data, str]:
        """Return all feeds; every item must be a mapping."""
        feeds = list(source)
        odd = [k for k, feed in enumerate(feeds) if not isinstance(feed, Mapping)]
        if odd:
            kind = type(feeds[odd[0]]).__name__
            raise DataError(
                f"the calibration data: item {odd[0]} is a {kind}, not a mapping from input name to array."
            )
        if not feeds:
            raise DataError("the calibration data has no samples.")
        return feeds, "the calibration data"

    def files(self, source: Any) -> list[tuple[str, Path]]:
        """Return nothing: the files behind feeds, if any, are unknown."""
        return []
