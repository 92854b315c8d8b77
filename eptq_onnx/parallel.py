"""Work on batch after batch on all cores, results in order.

Every onnxruntime session has one thread, and batches run side by side: on small batches that keeps all cores
busy where threads inside an operator would not, and the results do not depend on how many cores there are.
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
"""Each holds the tensors of a batch."""


def worker_count() -> int:
    """Cores that this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)


def ordered_map(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``function`` of every item, in order; as many at once as there are workers.

    ``function`` must release the GIL to gain anything: onnxruntime's sessions and numpy's large operations
    do. Items are drawn, and results kept, only a worker's share ahead of what the caller has taken, and one
    more, so that no worker waits for the next to be made.
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
