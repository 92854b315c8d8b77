"""Which cores a run uses, and batches processed on all of them with results in order.

Workers are the only threads that compute: every onnxruntime session and every matrix product of numpy and
scipy has one thread, and batches run side by side. For small batches this keeps all cores busy where threads
inside an operator would not, threads never wait for each other in a spin, and results do not depend on the
number of cores.

The batches themselves may go elsewhere: see `Workers`, and the package `workers`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TypeVar

import scipy.linalg  # noqa: F401  # loads scipy's own BLAS, so that its threads are limited, too
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")

_MOST_WORKERS = 8
"""Default maximum of workers; each holds the tensors of a batch."""
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")

_WORKERS: ContextVar[int | None] = ContextVar("workers", default=None)
"""Workers of the current run; None for one per core."""


@contextmanager
def owned_threads(count: int | None) -> Iterator[None]:
    """Limit all computation in a block to ``count`` threads; None allows one per core, at most 8.

    BLAS gets one thread, for the whole process until the block ends.
    """
    token = _WORKERS.set(count)
    try:
        with threadpool_limits(1, "blas"):
            yield
    finally:
        _WORKERS.reset(token)


def available_cores() -> int:
    """Return the number of cores that this process may use: by its affinity and its container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(int(quota) for quota in _quotas())]))


def _quotas() -> Iterator[float]:
    """Yield the CPU quotas of this process's control groups, in cores (Linux, versions 1 and 2)."""
    try:
        groups = _OWN_CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, own = group.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A container sees its own group as the root, or under the path that it has on the host.
        path = PurePosixPath(own.lstrip("/"))
        for folder in (_CGROUPS / controllers / p for p in (path, *path.parents)):
            with suppress(OSError, ValueError):
                quota, period = _quota_of(folder, version=1 if controllers else 2)
                if quota > 0:
                    yield quota / period


def _quota_of(folder: Path, version: int) -> tuple[float, float]:
    """Return quota and period of a control group; ValueError or OSError if it has none."""
    if version == 1:
        first, second = (folder / f"cpu.cfs_{name}_us" for name in ("quota", "period"))
        return float(first.read_text()), float(second.read_text())
    quota, period = (folder / "cpu.max").read_text().split()
    return float(quota), float(period)


def worker_count() -> int:
    """Return the number of workers of the current run: see `owned_threads`."""
    return _WORKERS.get() or min(available_cores(), _MOST_WORKERS)


class Workers(ABC):
    """What processes the batches of a run: threads of this process, or other processes and machines.

    Attributes
    ----------
    distant : bool
        True if batches leave this process, so that what they need must be picklable.
    """

    distant: ClassVar[bool] = False

    @abstractmethod
    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Apply ``function`` to every item, and yield the results in order; see `ordered_map`."""

    def shared(self, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Return arrays that every map will use, where workers reach them; nobody may change them."""
        return list(arrays)

    def close(self) -> None:  # noqa: B027 (threads end with each map)
        """Let go of all workers."""


class Threads(Workers):
    """Threads of this process, as many as `worker_count` says."""

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """See `Workers.map`."""
        count = worker_count()
        with ThreadPoolExecutor(count) as pool:
            waiting: deque[Future[R]] = deque()
            try:
                for item in items:
                    if len(waiting) > count:
                        yield waiting.popleft().result()
                    waiting.append(pool.submit(copy_context().run, function, item))
                while waiting:
                    yield waiting.popleft().result()
            finally:
                # The caller stopped early, or an item failed.
                for future in waiting:
                    future.cancel()


_THREADS = Threads()
_CHOSEN: ContextVar[Workers] = ContextVar("chosen", default=_THREADS)
"""Workers of the current run."""


@contextmanager
def working_on(workers: Workers) -> Iterator[None]:
    """Process the batches of a block on ``workers``, and close them at its end."""
    token = _CHOSEN.set(workers)
    try:
        yield
    finally:
        _CHOSEN.reset(token)
        workers.close()


def shared(arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Return arrays that every map will use, where the workers of the current run reach them."""
    return _CHOSEN.get().shared(arrays)


def are_distant() -> bool:
    """Return True if the batches of the current run may leave this process."""
    return _CHOSEN.get().distant


def ordered_map(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Apply ``function`` to every item in parallel, and yield the results in order.

    ``function`` must release the GIL to run in parallel; onnxruntime sessions and large numpy operations do.
    It must not change its items or anything else, and nobody may change its results: with distant workers
    they are copies, and read-only. Items are drawn, and results kept, only as far ahead of the caller as
    there are workers, and a few more, so that no worker waits for its next item.
    """
    return _CHOSEN.get().map(function, items)


def paired_map(
    function: Callable[[S], R], items: Iterable[T], sent: Callable[[T], S]
) -> Iterator[tuple[T, R]]:
    """Yield each item with the result of ``function`` for what ``sent`` takes from it; see `ordered_map`."""
    drawn: deque[T] = deque()

    def remembered() -> Iterator[S]:
        for item in items:
            drawn.append(item)
            yield sent(item)

    for result in ordered_map(function, remembered()):
        yield drawn.popleft(), result


def local_map(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Do the same in threads of this process, for what only exists here, such as open files."""
    return _THREADS.map(function, items)
