"""Reader of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eptq_onnx.data.origin import Origin
from eptq_onnx.data.pictures import decoded, pillow, sight_of
from eptq_onnx.data.readers.base import Opened, Request
from eptq_onnx.data.readers.files import FilesReader, collected


class PictureReader(FilesReader):
    """Reads pictures, each a sample, as the model sees them."""

    form = (
        "a folder of pictures (.jpg, .png and others that Pillow reads), subfolders included, prepared as "
        "--image says"
    )
    order = 36
    suffixes = frozenset({
        ".jpg", ".jpeg", ".jfif", ".png", ".apng", ".bmp", ".dib", ".gif", ".webp", ".avif", ".tif", ".tiff",
        ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".pcx", ".sgi", ".heic", ".heif",
    })  # fmt: skip

    def open(self, source: Any, request: Request) -> Opened:
        """Return all pictures that can be read, decoded once."""
        sight = sight_of(request.model, request.inputs, request.reading.image)
        with pillow():
            shelf, broken = collected(
                self, Path(source), request, lambda file: decoded(file, sight), "pictures"
            )
        origin = Origin(str(source), {"image": str(sight.recipe)}, sight.guessed, (*sight.notes, *broken))
        return Opened({sight.input.name: shelf.values()}, origin)
