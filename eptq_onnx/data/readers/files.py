"""Readers of folders full of files of one kind, subfolders included."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from numpy.typing import NDArray

from eptq_onnx.data.readers.base import Reader, Request, is_path
from eptq_onnx.data.shelf import Shelf
from eptq_onnx.errors import DataError
from eptq_onnx.parallel import local_map

_LOOKED_AT = 1000
"""Files that decide what a folder holds."""
_NAMED = 5
"""Files that a note names."""


class FilesReader(Reader):
    """Reads a file of some kinds, or a folder that holds more of these than of other readers' kinds.

    Attributes
    ----------
    suffixes : frozenset of str
        Endings of the names, in lower case.
    """

    suffixes: ClassVar[frozenset[str]]

    def takes(self, source: Any) -> bool:
        """Return True for a file with such a name, and a folder that holds mostly such."""
        if not is_path(source):
            return False
        path = Path(source)
        return reader_of(path) is type(self) if path.is_dir() else path.suffix.lower() in self.suffixes

    def files(self, source: Any) -> list[tuple[str, Path]]:
        """Return all such files."""
        return [("the calibration data", path) for path in self.paths(Path(os.path.abspath(source)))]

    def paths(self, path: Path) -> list[Path]:
        """Return the file, or all such files of the folder, sorted by folder and name.

        Raises
        ------
        DataError
            If there are none, or a subfolder cannot be read.
        """
        if not path.is_dir():
            return [path]
        return [file for file in walk(path) if file.suffix.lower() in self.suffixes]


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders, sorted; hidden ones and cycles of links are left out.

    Raises
    ------
    DataError
        If a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"data folder {error.filename} cannot be read: {error.strerror or error}.") from error

    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(n for n in folders if not n.startswith((".", "__MACOSX")))
        if real not in seen:
            yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))
        seen.add(real)


def reader_of(folder: Path) -> type[FilesReader] | None:
    """Return the reader of the most frequent kind among the first files; None if nobody knows any."""
    readers = sorted(FilesReader.__subclasses__(), key=lambda reader: reader.order)
    found = Counter(path.suffix.lower() for path in islice(walk(folder), _LOOKED_AT))
    counts = {reader: sum(found[suffix] for suffix in reader.suffixes) for reader in readers}
    best = max(readers, key=lambda reader: counts[reader])
    return best if counts[best] else None


@dataclass(frozen=True)
class Collected:
    """Samples made of files.

    Parameters
    ----------
    shelf : Shelf
        The samples.
    files : tuple of path
        The file of each.
    names : tuple of str
        The same, relative to the folder.
    notes : tuple of str
        A note on files that are left out; empty if there are none.
    """

    shelf: Shelf
    files: tuple[Path, ...]
    names: tuple[str, ...]
    notes: tuple[str, ...]


def collected(
    reader: FilesReader,
    path: Path,
    request: Request,
    read: Callable[[Path], NDArray[Any] | str],
    what: str,
) -> Collected:
    """Read the chosen files of a folder one after the other.

    Parameters
    ----------
    reader : FilesReader
    path : path
        A file or a folder.
    request : Request
    read : callable
        Returns the sample of a file, or why it cannot be read. Called in several threads.
    what : str
        What the files are, for messages.

    Raises
    ------
    DataError
        If none can be read.
    """
    if not path.exists():
        raise DataError(f"data file or folder {path} does not exist.")
    files = reader.paths(path)
    chosen = [files[k] for k in request.chosen(len(files))]
    shelf, broken = Shelf(), dict[Path, str]()
    for file, found in zip(chosen, local_map(read, chosen), strict=True):
        if isinstance(found, str):
            broken[file] = found
        else:
            shelf.add(found)
    if not len(shelf):
        first = next(iter(broken))
        raise DataError(f"none of the {what} of {path} can be read: {first}: {broken[first]}.")
    root = path if path.is_dir() else path.parent
    kept = tuple(file for file in chosen if file not in broken)
    names = tuple(file.relative_to(root).as_posix() for file in kept)
    return Collected(shelf, kept, names, _left_out(broken, len(chosen), what))


def _left_out(broken: dict[Path, str], count: int, what: str) -> tuple[str, ...]:
    """Return a note that names files that cannot be read, with their reasons; empty without any."""
    if not broken:
        return ()
    named = [f"{path} ({why})" for path, why in list(broken.items())[:_NAMED]]
    more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
    verb = "is" if len(broken) == 1 else "are"
    return (f"{len(broken)} of {count} {what} cannot be read and {verb} left out: {', '.join(named)}{more}",)
