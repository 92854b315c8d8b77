"""Files of a workdir: contents named by their digests, and entries that say what belongs together.

Files are written completely or not at all, contents before the entries that name them. Every file is verified
when it is read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eptq_onnx import scratch
from eptq_onnx.errors import OutputError
from eptq_onnx.workdir.codec import damaged, digest_of, hash_of_file, objects_of

_MARK = "eptq-onnx.workdir"
"""File that marks a workdir, and that a run locks while it uses the folder."""


class Workdir:
    """A workdir, used by one run at a time; a context manager.

    Parameters
    ----------
    path : path
        Created if missing.

    Raises
    ------
    OutputError
        If it cannot be used: no folder, one of other files, of another run, without room, or with damaged
        files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(os.path.abspath(path))
        self._objects, self._entries = self.path / "objects", self.path / "entries"
        self._sound: set[str] = set()
        self._lock = -1

    def __enter__(self) -> Workdir:
        with self._errors():
            if self.path.is_dir():
                if not (self.path / _MARK).exists() and any(self.path.iterdir()):
                    raise OutputError(
                        f"workdir {self.path} holds other files: give an empty or a new folder."
                    )
            elif os.path.lexists(self.path):
                raise OutputError(f"workdir {self.path} is no folder: give another name.")
            for folder in (self._objects, self._entries):
                folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / _MARK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if scratch.lock(lock) is False:
                raise OutputError(
                    f"workdir {self.path} is in use by another run: wait for it, or give another name."
                )
            with self._errors():
                # Of runs that were killed while they wrote.
                for folder in (self._objects, *self._entries.iterdir()):
                    for file in folder.glob(".*.tmp"):
                        file.unlink()
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                # What is damaged, and was not needed, does no harm.
                with suppress(OutputError), self._errors():
                    self._sweep()
        finally:
            os.close(self._lock)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise OutputError(
                f"workdir {self.path} cannot be written or read ({e.strerror or e}): make room, or "
                "give another folder; what was kept until now stays."
            ) from e

    # ---- contents ------------------------------------------------------------------------------------------
    def put(self, content: bytes | memoryview) -> str:
        """Store a content and return its digest."""
        digest = digest_of(content)
        self._write(self._objects / digest, content)
        return digest

    def put_file(self, path: str) -> str:
        """Store the content of a file and return its digest."""
        with self._errors(), open(path, "rb") as file:
            digest = hash_of_file(file.read)
            if not (self._objects / digest).exists():
                file.seek(0)
                self._write(self._objects / digest, file)
        return digest

    def get(self, digest: str) -> bytes:
        """Return a content."""
        with self._errors():
            content = self._found(digest).read_bytes()
        self._check(digest, digest_of(content))
        return content

    def mapped(self, digest: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return a content as a flat array, mapped copy-on-write."""
        with self._errors():
            return np.asarray(np.memmap(self._whole(digest), dtype, mode="c"))

    def file(self, digest: str, folder: str) -> str:
        """Return a file in ``folder`` with a content: a hard link if possible, else a copy."""
        with self._errors():
            source, target = self._whole(digest), os.path.join(folder, f"{digest}.weight")
            if not os.path.exists(target):
                try:
                    os.link(source, target)
                except OSError:
                    shutil.copyfile(source, target)
        return target

    def _whole(self, digest: str) -> Path:
        """Return the file of a content, verified once."""
        path = self._found(digest)
        if digest not in self._sound:
            with open(path, "rb") as file:
                self._check(digest, hash_of_file(file.read))
        return path

    def _found(self, digest: str) -> Path:
        path = self._objects / digest
        if not path.exists():
            raise OutputError(
                f"workdir {self.path} lacks the file {path.name}: remove the folder, and run again."
            )
        return path

    def _check(self, digest: str, found: str) -> None:
        if found != digest:
            raise damaged(f"file {self._objects / digest}")
        self._sound.add(digest)

    # ---- entries -------------------------------------------------------------------------------------------
    def entries(self, name: str) -> list[dict[str, Any]]:
        """Return all entries of a name, in a fixed order."""
        return [self._entry(path) for path in sorted((self._entries / name).glob("*.json"))]

    def add(self, name: str, entry: dict[str, Any]) -> None:
        """Add an entry.

        Parameters
        ----------
        name : str
        entry : dict
            JSON object; ``values`` lists the digests of all values that it names.
        """
        with self._errors():
            (self._entries / name).mkdir(exist_ok=True)
        content = json.dumps(entry, sort_keys=True).encode()
        self._write(self._entry_path(name, content), content)

    def remove(self, name: str, entry: dict[str, Any]) -> None:
        """Remove an entry."""
        with self._errors():
            self._entry_path(name, json.dumps(entry, sort_keys=True).encode()).unlink(missing_ok=True)

    def _entry_path(self, name: str, content: bytes) -> Path:
        return self._entries / name / f"{digest_of(content)}.json"

    def _entry(self, path: Path) -> dict[str, Any]:
        with self._errors():
            content = path.read_bytes()
        if digest_of(content) != path.stem:
            raise damaged(f"file {path}")
        return json.loads(content)  # type: ignore[no-any-return]

    def _sweep(self) -> None:
        """Remove contents that no entry names."""
        named = {
            digest
            for folder in self._entries.iterdir()
            for entry in self.entries(folder.name)
            for digest in entry["values"]
        }
        kept = set().union(*(objects_of(digest, self) for digest in named))
        for file in self._objects.iterdir():
            if file.name not in kept:
                file.unlink()

    def _write(self, path: Path, content: Any) -> None:
        """Write a file completely; a file that exists already has this content."""
        if path.exists():
            return
        temporary = scratch.beside(path)
        try:
            with self._errors():
                with open(temporary, "xb") as file:
                    if hasattr(content, "read"):
                        shutil.copyfileobj(content, file, 2**24)
                    else:
                        file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
        finally:
            with suppress(OSError):
                scratch.discard(temporary)
