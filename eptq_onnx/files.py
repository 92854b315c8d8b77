"""Output files: written whole or not at all, and never over an input."""

from __future__ import annotations

import os
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from eptq_onnx import scratch
from eptq_onnx.errors import OutputError

StrPath = str | os.PathLike[str]
Named = Sequence[tuple[str, Path]]
"""Descriptions and paths of files."""


def data_file(path: StrPath) -> Path:
    """Return the path of the external data of a model above protobuf's 2 GiB limit."""
    return Path(path).with_name(f"{Path(path).name}.data")


def check_apart(outputs: Mapping[str, StrPath], inputs: Named) -> None:
    """Refuse outputs that would overwrite an input or each other.

    Parameters
    ----------
    outputs : mapping of str to path
        Description ("the output") and path of each output.
    inputs : sequence of (str, path)
        Description and path of each file that the run reads; links are followed.

    Raises
    ------
    OutputError
    """
    for name, path in outputs.items():
        for what, used in inputs:
            if _is_same(path, used):
                raise OutputError(f"{name} {path} would overwrite {what} {used}: choose another name.")
    paths = list(outputs.items())
    for k, (name, path) in enumerate(paths):
        for other, taken in paths[:k]:
            # Files that are not there yet cannot be compared: on some file systems names in other letters are
            # the same.
            if _is_same(path, taken) or _folded(path) == _folded(taken):
                raise OutputError(f"{name} {path} would overwrite {other} {taken}: choose another name.")


def model_outputs(path: StrPath) -> dict[str, StrPath]:
    """List the files that a model may be written to, for `check_apart`."""
    return {"the output": path, "the data file of the output": data_file(path)}


def check_writable(path: StrPath) -> None:
    """Raise OutputError unless a file can be created at ``path``."""
    target = Path(path)
    if "\0" in str(target):
        raise OutputError(f"{str(target)!r} cannot be written: no file name has null characters.")
    if target.is_dir():
        raise OutputError(f"{target} is a folder: give a file name.")
    if not target.parent.is_dir():
        raise OutputError(
            f"{target} cannot be written: the folder {target.parent} does not exist: create it first."
        )
    if (target.exists() and not target.is_file()) or _is_descriptor(target):
        raise OutputError(f"{target} cannot be replaced: it is not an ordinary file.")
    if not os.access(target.parent, os.W_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise OutputError(f"{target} cannot be written: no permission.")


def write_atomically(path: StrPath, data: bytes) -> None:
    """Write a file so that it is either complete or unchanged.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    with Replacement(path) as (temporary,):
        Path(temporary).write_bytes(data)


class Replacement:
    """Replace files together, once all of them are written.

    A context manager that returns a temporary path for each file. On exit the files move to their places, the
    last file last. After an exception, in the block or during the moves, everything is as it was before.

    Parameters
    ----------
    *paths : path

    Raises
    ------
    OutputError
        If something cannot be written.
    """

    def __init__(self, *paths: StrPath) -> None:
        self._targets = [Path(p) for p in paths]
        self._temporary: list[str] = []

    def __enter__(self) -> list[str]:
        for target in self._targets:
            check_writable(target)
        self._temporary = [scratch.beside(t) for t in self._targets]
        return self._temporary

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        backups: list[str] = []
        try:
            if error is None:
                self._commit(backups)
        except OSError as e:
            error = e
        finally:
            for path in (*self._temporary, *backups):
                scratch.discard(path)
        if isinstance(error, OSError):
            raise OutputError(f"{self._targets[-1]} cannot be written: {error.strerror or error}.") from error

    def _commit(self, backups: list[str]) -> None:
        for path in self._temporary:
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
        former: list[tuple[Path, str | None]] = []
        try:
            for target in self._targets[:-1]:
                backup = scratch.beside(target)
                backups.append(backup)
                former.append((target, _copy(target, backup)))
            for path, target in zip(self._temporary, self._targets, strict=True):
                os.replace(path, target)
        except BaseException:
            if os.path.lexists(self._temporary[-1]):
                for target, copy in former:
                    _restore(target, copy)
            raise


def _copy(path: Path, backup: str) -> str | None:
    """Keep a copy under another name, as a hard link if possible; return None without a file."""
    if not os.path.lexists(path):
        return None
    try:
        os.link(path, backup, follow_symlinks=False)
    except OSError:  # not every file system has hard links
        shutil.copy2(path, backup, follow_symlinks=False)
    return backup


def _restore(path: Path, backup: str | None) -> None:
    with suppress(OSError):
        if backup is None:
            path.unlink(missing_ok=True)
        else:
            os.replace(backup, path)


def _is_same(a: StrPath, b: StrPath) -> bool:
    """Return True if two paths lead to the same file, through links or letter case."""
    with suppress(OSError, ValueError):
        # Real paths of all pictures in a large folder would take seconds.
        if os.path.exists(a) != os.path.exists(b):
            return False
        if os.path.samefile(a, b):
            return True
    return os.path.realpath(a) == os.path.realpath(b)


def _folded(path: StrPath) -> tuple[str, str]:
    name = unicodedata.normalize("NFC", os.path.basename(path)).casefold()
    return os.path.realpath(os.path.dirname(os.path.abspath(path))), name


def _is_descriptor(path: Path) -> bool:
    """Return True for paths such as /dev/stdout.

    These are links, and lead to ordinary files where the shell redirects them.
    """
    return path.is_symlink() and os.readlink(path).startswith("/proc/")
