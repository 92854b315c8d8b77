"""Temporary files, in one folder per process that is removed however the process ends.

Paths are registered before they are created, so an exception at any moment leaves nothing that `clear` does
not know about. A killed process leaves its folder behind; the next process removes it. A process locks its
folder while it lives, so the folder of a live process is never removed, not even from another container.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from eptq_onnx.errors import OutputError

_HAS_LOCKS = os.name == "posix"
"""Without locks the folders of killed processes stay."""
if _HAS_LOCKS:
    import fcntl

_NAME = "eptq-onnx-{pid}-{token}"
_PATTERN = re.compile(r"eptq-onnx-\d+-[0-9a-f]{8}")
_NEWBORN = 60
"""Age in seconds below which an unlocked folder stays: its process may be about to lock it."""


class _Process:
    """Temporary files of one process; a forked child starts with none."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.guard = threading.RLock()
        self.root: str | None = None
        self.handle = -1
        self.users = 0
        self.files: set[str] = set()


_process = _Process()


def _mine() -> _Process:
    global _process  # noqa: PLW0603
    if _process.pid != os.getpid():
        _process = _Process()
    return _process


@contextmanager
def folder() -> Iterator[str]:
    """Create a folder inside the process's temporary folder; it is removed on exit, with its content.

    Raises
    ------
    OutputError
        If it cannot be created.
    """
    mine, counted, path = _mine(), False, ""
    try:
        with mine.guard:
            mine.users += 1
            counted = True
            try:
                path = os.path.join(mine.root or _make_root(mine), secrets.token_hex(4))
                os.mkdir(path, 0o700)
            except OSError as e:
                raise OutputError(
                    f"no temporary folder can be made ({e.strerror or e}): "
                    "set TMPDIR to a folder with enough room."
                ) from e
        yield path
    finally:
        if path:
            shutil.rmtree(path, ignore_errors=True)
        with mine.guard:
            mine.users -= counted
            if not mine.users:
                _remove_root(mine)


def beside(target: str | os.PathLike[str]) -> str:
    """Reserve the name of a temporary file in the folder of ``target``; the caller must `discard` it."""
    mine = _mine()
    path = os.path.join(os.path.dirname(os.path.abspath(target)), f".{_new_name()}.tmp")
    mine.files.add(path)
    return path


def discard(path: str) -> None:
    """Remove a file reserved by `beside`, if it exists."""
    with contextlib.suppress(OSError):
        os.unlink(path)
    _mine().files.discard(path)


def clear() -> None:
    """Remove all temporary files of this process."""
    mine = _mine()
    for path in tuple(mine.files):
        discard(path)
    _remove_root(mine)


def _new_name() -> str:
    return _NAME.format(pid=os.getpid(), token=secrets.token_hex(4))


def _make_root(mine: _Process) -> str:
    parent = tempfile.gettempdir()
    _sweep(parent)
    while True:
        mine.root = os.path.join(parent, _new_name())
        os.mkdir(mine.root, 0o700)
        if not _HAS_LOCKS:
            return mine.root
        mine.handle = os.open(mine.root, os.O_RDONLY)
        # Held by a process that takes this folder for a dead one's, the lock fails, or there is no folder any
        # more.
        if lock(mine.handle) is not False and os.path.isdir(mine.root):
            return mine.root
        os.close(mine.handle)
        mine.handle = -1


def _remove_root(mine: _Process) -> None:
    root, handle, mine.root, mine.handle = mine.root, mine.handle, None, -1
    if root is not None:
        shutil.rmtree(root, ignore_errors=True)
    if handle >= 0:
        os.close(handle)


def lock(handle: int) -> bool | None:
    """Lock an open file or folder until it is closed.

    Returns True if the lock is now ours, False if another process has it, None without file locks.
    """
    if not _HAS_LOCKS:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _sweep(parent: str) -> None:
    """Remove the folders of killed processes."""
    if not _HAS_LOCKS:
        return
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if _PATTERN.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_if_dead(entry.path)


def _remove_if_dead(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        state = os.fstat(handle)
        if state.st_uid == os.getuid() and time.time() - state.st_mtime > _NEWBORN and lock(handle):
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(handle)


atexit.register(clear)
