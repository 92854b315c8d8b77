"""Reader of a folder of feeds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from eptq_onnx.data import archives
from eptq_onnx.data.readers.base import Data, Reader, is_path
from eptq_onnx.errors import DataError


class FolderReader(Reader):
    """Reads a folder of .npz files, each a feed, in the order of their names."""

    form = "a folder of .npz files, each what the model takes in one run"
    order = 40

    def takes(self, source: Any) -> bool:
        """Return True for folders."""
        return is_path(source) and Path(source).is_dir()

    def open(self, source: Any) -> tuple[Data, str]:
        """Return one feed per file."""
        path = Path(source)
        feeds = []
        files = sorted(path.glob("*.npz"))
        if not files:
            raise DataError(f"data folder {path} has no .npz file.")
        read = [(file, archives.read_file(file)) for file in files]
        for file, feed in read:
            if not isinstance(feed, dict):
                raise DataError(
                    f"data file {file} holds one array without a name: "
                    "in a folder each file is a feed, saved with numpy.savez."
                )
            feeds.append(feed)
        return feeds, str(path)

    def files(self, source: Any) -> list[tuple[str, Path]]:
        """Return all .npz files of the folder."""
        return [
            ("the calibration data", file) for file in sorted(Path(os.path.abspath(source)).glob("*.npz"))
        ]
