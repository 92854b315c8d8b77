"""Reader of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from eptq_onnx.data.origin import Origin
from eptq_onnx.data.pictures import decoded, pillow, sight_of
from eptq_onnx.data.placing import Placed
from eptq_onnx.data.readers.base import Opened, Request, Wanted
from eptq_onnx.data.readers.files import FilesReader, collected
from eptq_onnx.errors import DataError


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
        placed: dict[Path, Placed] = {}

        def read(file: Path) -> NDArray[Any] | str:
            found = decoded(file, sight)
            if isinstance(found, str):
                return found
            pixels, placed[file] = found
            return pixels

        with pillow():
            found = collected(self, Path(source), request, read, "pictures")
        notes = (*sight.notes, *found.notes)
        origin = Origin(str(source), {"image": str(sight.recipe)}, sight.guessed, notes)
        content = {sight.input.name: found.shelf.values()}
        return Opened(content, origin, names=found.names, placed=tuple(placed[f] for f in found.files))

    def wanted(self, request: Request) -> Wanted | None:
        """Return pictures if the model has one input with four axes, one or three of them channels."""
        shapes = [i.dims or () for i in request.inputs]
        if len(shapes) != 1 or len(shapes[0]) != 4 or not {1, 3} & {shapes[0][1], shapes[0][3]}:
            return None
        try:
            sight = sight_of(request.model, request.inputs, request.reading.image)
        except DataError:
            return None
        arguments = ("--data", "photos", "--image", str(sight.recipe))
        return Wanted("pictures", arguments, sight.guessed, sight.notes)
