"""Where the batches of a run are processed: backends, one file each, discovered automatically."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from eptq_onnx.discovery import classes
from eptq_onnx.errors import ConfigError
from eptq_onnx.parallel import owned_threads, working_on
from eptq_onnx.workers.base import Backend

DEFAULT = "threads"


@cache
def registered() -> dict[str, type[Backend]]:
    """Return all backends by name, the default first."""
    found = {backend.name: backend for backend in classes(__name__, Backend)}  # type: ignore[type-abstract]
    return {DEFAULT: found.pop(DEFAULT), **found}


def make(name: str) -> Backend:
    """Create a backend.

    Raises
    ------
    ConfigError
        If there is no such backend.
    """
    known = registered()
    if name not in known:
        raise ConfigError(f"workers {name!r} are unknown: choose one of {', '.join(known)}.")
    return known[name]()


@contextmanager
def employed(name: str, threads: int | None) -> Iterator[None]:
    """Process the batches of a block on the workers of a name, and its other work on ``threads`` threads.

    Raises
    ------
    ConfigError
        If there is no such backend.
    InstallError
        If software that it needs is missing.
    WorkerError
        If no worker can be had.
    """
    with owned_threads(threads), working_on(make(name).start()):
        yield
