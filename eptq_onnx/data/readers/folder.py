"""Reader of a folder of feeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eptq_onnx.data import archives
from eptq_onnx.data.origin import Origin
from eptq_onnx.data.readers.base import Feed, Opened, Request, is_path
from eptq_onnx.data.readers.files import FilesReader, reader_of
from eptq_onnx.errors import DataError


class FolderReader(FilesReader):
    """Reads a folder of .npz or .npy files, each a feed, in the order of their names."""

    form = (
        "a folder of .npz files, each what the model takes in one run, or of such .npy files for a model "
        "with one input"
    )
    order = 40  # behind the readers of other folders: it takes those in which nobody knows a file
    suffixes = frozenset({".npz", ".npy"})

    def takes(self, source: Any) -> bool:
        """Return True for folders of such files, and of nothing that is known."""
        return is_path(source) and Path(source).is_dir() and reader_of(Path(source)) in (type(self), None)

    def open(self, source: Any, request: Request) -> Opened:
        """Return one feed per file."""
        path = Path(source)
        files = self.paths(path)
        if not files:
            raise DataError(
                f"data folder {path} has no .npz file, nor pictures (.jpg, .png, ...) or "
                "sounds (.wav, .flac)."
            )
        return Opened([_feed(files[k], request) for k in request.chosen(len(files))], Origin(str(path)))


def _feed(file: Path, request: Request) -> Feed:
    found = archives.read_file(file)
    if isinstance(found, dict):
        return found
    if len(request.inputs) != 1:
        raise DataError(
            f"data file {file} holds one array without a name, but the model has {len(request.inputs)} "
            "inputs: in a folder each file is a feed, saved with numpy.savez."
        )
    return {request.inputs[0].name: found}
