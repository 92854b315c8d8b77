"""Process batches on all cores, with results in order.

Every onnxruntime session has one thread, and batches run side by side. For small batches this keeps all cores
busy where threads inside an operator would not, and results do not depend on the number of cores.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

_MOST_WORKERS = 8
"""Maximum number of workers; each holds the tensors of a batch."""


def worker_count() -> int:
    """Return the number of cores that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)


def ordered_map(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Apply ``function`` to every item in parallel, and yield the results in order.

    ``function`` must release the GIL to run in parallel; onnxruntime sessions and large numpy operations do.
    Items are drawn, and results kept, only as far ahead of the caller as there are workers, plus one, so that
    no worker waits for its next item.
    """
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
