"""Processes of Ray, on this machine or on all of a cluster."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.errors import WorkerError, one_line
from eptq_onnx.parallel import Threads, Workers, worker_count
from eptq_onnx.workers.base import Backend
from eptq_onnx.workers.packing import Kept, Message, Packer
from eptq_onnx.workers.ray_link import check_installed, connect, native
from eptq_onnx.workers.ray_tasks import tasks

T = TypeVar("T")
R = TypeVar("R")

WORTH = 3.0
"""An item is sent if it computes at least so many times as long as this process takes to send it.

Below, this process is done sooner by itself: its threads need nothing sent.
"""
START_SECONDS = 120.0
"""Longest wait for a process to start while there is none."""
_REFRESH = 5.0
"""Seconds between looks at which nodes there are."""
_MOST_LOSSES = 3
"""Processes that may end over one batch, or start on one node in vain, until it is given up."""
_log = logging.getLogger(__name__)


class RayBackend(Backend):
    """Processes of Ray.

    Without a cluster's address, one is started on this machine for the time of the run.
    """

    name = "ray"
    about = (
        "processes of Ray, on the cluster at RAY_ADDRESS or else on this machine; needs the extra ray, and "
        "the same versions on all nodes"
    )

    apart = True

    def tasks(
        self, function: Callable[[T], R], jobs: Sequence[T], cores: Callable[[T], int]
    ) -> Iterator[tuple[int, R | WorkerError]]:
        """See `Backend.tasks`: each in a process of its own."""
        return tasks(function, jobs, cores)

    def start(self) -> Workers:
        """See `Backend.start`."""
        check_installed()
        return RayWorkers()


@dataclass(eq=False)
class _Process:
    """An actor on a node."""

    node: str
    actor: Any
    slots: int
    number: int


@dataclass(eq=False)
class _Job:
    """An item on its way."""

    number: int
    item: Any
    message: Message
    reference: Any = None
    process: _Process | None = None
    losses: int = 0
    done: bool = False
    value: Any = None


@dataclass
class _Pace:
    """How long the items of one function compute, and how long it takes to send them, in seconds."""

    compute: float = 0.0
    send: float = 0.0
    computed: int = 0
    sent: int = 0

    @property
    def is_short(self) -> bool:
        """True if items are not worth being sent."""
        if not self.computed or not self.sent:
            return False
        return self.compute / self.computed < WORTH * self.send / self.sent

    def faded(self) -> None:
        """Give what was measured long ago less weight."""
        if self.computed > 200:
            self.compute, self.computed = self.compute / 2, self.computed // 2
        if self.sent > 200:
            self.send, self.sent = self.send / 2, self.sent // 2


@dataclass
class _Map:
    """One map in progress."""

    call: Any
    kept: Kept
    pace: _Pace
    waiting: deque[_Job] = field(default_factory=deque)
    running: dict[Any, _Job] = field(default_factory=dict)
    load: Counter[_Process] = field(default_factory=Counter)


class RayWorkers(Workers):
    """One process on each node of a cluster, with a thread for each core that the node offers.

    Batches are handed out as processes get free, by preference always the same ones to the same process. A
    process that ends is replaced as long as its node is there, and its batches are done again by whoever is
    free.

    Raises
    ------
    WorkerError
        If the cluster cannot be reached, or offers no core.
    """

    distant = True

    def __init__(self) -> None:
        self._ray = import_module("ray")
        self._actors = import_module("eptq_onnx.workers.ray_actor")
        self._began = connect(worker_count())
        self._packer = Packer(import_module("cloudpickle").Pickler, self._put)
        self._processes: list[_Process] = []
        self._starting: dict[Any, _Process] = {}
        self._failures: Counter[str] = Counter()
        self._numbers = itertools.count()
        self._paces: dict[object, _Pace] = {}
        self._looked = 0.0
        self._guard = threading.RLock()
        self._here = Threads()
        try:
            self._await_some(START_SECONDS)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all processes, and the cluster if it was started for this run."""
        with suppress(Exception):
            for process in (*self._processes, *self._starting.values()):
                self._ray.kill(process.actor)
        self._processes, self._starting = [], {}
        self._packer.forget()
        if self._began:
            self._ray.shutdown()

    def shared(self, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """See `Workers.shared`: the arrays in the store of this node."""
        plain = [np.asarray(a) for a in arrays]
        large = [k for k, a in enumerate(plain) if a.nbytes and not a.dtype.hasobject]
        if not large:
            return list(arrays)
        entry = self._put([np.ascontiguousarray(plain[k]) for k in large])
        found = native(self._ray.get, entry)
        self._packer.known(found[1:], entry)
        places = {k: found[n + 1] for n, k in enumerate(large)}
        return [places.get(k, a) for k, a in enumerate(arrays)]

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """See `Workers.map`."""
        pace = self._paces.setdefault(getattr(function, "__code__", type(function)), _Pace())
        if pace.is_short:
            return self._here.map(_timed(function, pace), items)
        return self._sent(function, items, pace)

    def _sent(self, function: Callable[[T], R], items: Iterable[T], pace: _Pace) -> Iterator[R]:
        kept, source = Kept(lasting=False), enumerate(items)
        current = _Map(self._call(function, kept), kept, pace)
        order: deque[_Job] = deque()
        more = True
        while more or order:
            while more and len(order) < 2 * self._slots + 1:
                drawn = next(source, None)
                if drawn is None:
                    more = False
                    break
                began = time.perf_counter()
                job = _Job(*drawn, self._packer.packed(drawn[1], kept))
                pace.send += time.perf_counter() - began
                order.append(job)
                current.waiting.append(job)
            if not order:
                break
            self._hand_out(current)
            while not order[0].done:
                self._settle(current)
                self._hand_out(current)
            yield order.popleft().value

    @property
    def _slots(self) -> int:
        return sum(p.slots for p in self._processes) or 1

    def _call(self, function: object, kept: Kept) -> Any:
        """Return the function of a map as it is sent."""
        message: Any = self._packer.packed(function, kept)
        if message.entries or len(message.head) > 2**14:
            # Inside a tuple it is not looked up before each call.
            message = native(self._ray.put, message)
        return self._actors.Call(next(self._numbers), message)

    def _hand_out(self, current: _Map) -> None:
        """Give waiting items to processes that have room."""
        while current.waiting:
            # One more than it computes, so that none waits for its next item.
            free = [p for p in self._processes if current.load[p] <= p.slots]
            if not free:
                return
            job = current.waiting.popleft()
            usual = self._processes[job.number % len(self._processes)]
            process = usual if usual in free else min(free, key=lambda p: current.load[p] / p.slots)
            began = time.perf_counter()
            job.process = process
            job.reference = process.actor.run.remote(
                current.call, self._actors.Part(job.message.head, job.message.places), *job.message.entries
            )
            current.pace.send += time.perf_counter() - began
            current.load[process] += 1
            current.running[job.reference] = job

    def _settle(self, current: _Map) -> None:
        """Wait until an item is done or a process has started or ended, and take note of it."""
        self._look()
        if not self._processes:
            self._await_some(START_SECONDS)
            return
        # Of several that are ready, the first is returned.
        references = [*self._starting, *current.running]
        ready, _ = native(self._ray.wait, references, num_returns=1, timeout=_REFRESH)
        for reference in ready:
            if reference in self._starting:
                self._welcome(reference)
            else:
                self._take(current, current.running.pop(reference))

    def _take(self, current: _Map, job: _Job) -> None:
        """Take the result of an item, or have it done again."""
        errors = self._ray.exceptions
        process, pace = job.process, current.pace
        assert process is not None
        current.load[process] -= 1
        began = time.perf_counter()
        try:
            head, *arrays = native(self._ray.get, job.reference)
        except (errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError) as e:
            self._lost(process, e)
            self._again(current, job, e)
        except (errors.ObjectLostError, errors.TaskUnschedulableError) as e:
            # What the item was made of went with a node; this process still has all of it.
            self._packer.forget()
            current.kept.clear()
            job.message = self._packer.packed(job.item, current.kept)
            self._again(current, job, e)
        except errors.RayError as e:
            raise WorkerError(f"a batch cannot be processed by Ray: {one_line(e, 400)}") from e
        else:
            fine, value, rest = self._packer.joined(head, arrays, job.reference)
            if not fine:
                raise value from RuntimeError(f"in a process of Ray:\n{rest}")
            pace.send += time.perf_counter() - began
            pace.compute, pace.computed, pace.sent = pace.compute + rest, pace.computed + 1, pace.sent + 1
            pace.faded()
            job.done, job.value, job.item, job.reference = True, value, None, None

    def _again(self, current: _Map, job: _Job, error: Exception) -> None:
        job.losses += 1
        if job.losses > _MOST_LOSSES:
            raise WorkerError(
                f"{job.losses} processes of Ray ended while they worked on the same batch, the last one so: "
                f"{one_line(error)}; more memory for each, or fewer threads, may help."
            ) from error
        current.waiting.appendleft(job)

    # ---- processes -----------------------------------------------------------------------------------------
    def _look(self) -> None:
        """Start processes on nodes that have none."""
        now = time.monotonic()
        if now - self._looked < _REFRESH:
            return
        self._looked = now
        with self._guard:
            used = {p.node for p in (*self._processes, *self._starting.values())}
            for node in self._ray.nodes():
                cores = int(node["Resources"].get("CPU", 0))
                name = node["NodeID"]
                if node["Alive"] and cores and name not in used and self._failures[name] < _MOST_LOSSES:
                    self._start(name, cores)

    def _start(self, node: str, cores: int) -> None:
        strategies = import_module("ray.util.scheduling_strategies")
        remote = self._ray.remote(self._actors.Actor).options(
            num_cpus=cores,
            max_concurrency=cores,
            scheduling_strategy=strategies.NodeAffinitySchedulingStrategy(node_id=node, soft=False),
        )
        process = _Process(node, remote.remote(), cores, next(self._numbers))
        self._starting[process.actor.ready.remote()] = process

    def _welcome(self, reference: Any) -> None:
        """Take in a process that has started, or note that it has not."""
        process = self._starting.pop(reference)
        try:
            versions, _ = native(self._ray.get, reference)
        except self._ray.exceptions.RayError as e:
            self._failures[process.node] += 1
            self._looked = 0.0
            _log.info("a process of Ray did not start on node %s: %s", process.node[:8], one_line(e))
            return
        own = self._actors.versions()
        if versions != own:
            others = ", ".join(f"{n} {v} instead of {own[n]}" for n, v in versions.items() if v != own[n])
            raise WorkerError(f"a node of the cluster has {others}: results would differ; install the same.")
        self._processes = sorted([*self._processes, process], key=lambda p: p.number)

    def _lost(self, process: _Process, error: Exception) -> None:
        """Replace a process that has ended, if its node is still there."""
        if process not in self._processes:
            return
        _log.info("a process of Ray on node %s has ended: %s", process.node[:8], one_line(error))
        self._processes = [p for p in self._processes if p is not process]
        with suppress(Exception):
            self._ray.kill(process.actor)
        self._looked = 0.0
        self._look()

    def _await_some(self, seconds: float) -> None:
        """Wait for a process; after that, there is at least one."""
        ends = time.monotonic() + seconds
        while not self._processes:
            self._looked = 0.0
            self._look()
            left = ends - time.monotonic()
            if left <= 0 or not (self._starting or self._may_come()):
                raise WorkerError(
                    "no worker is left: no node of the Ray cluster runs a process of this run; with a "
                    "workdir, the same command goes on when there is one."
                )
            if self._starting:
                ready, _ = native(self._ray.wait, list(self._starting), num_returns=1, timeout=min(left, 1.0))
                for reference in ready:
                    self._welcome(reference)
            else:
                time.sleep(min(left, 0.5))

    def _may_come(self) -> bool:
        """Return True if a node is there on which starting has not failed too often."""
        return any(
            n["Alive"] and n["Resources"].get("CPU", 0) and self._failures[n["NodeID"]] < _MOST_LOSSES
            for n in self._ray.nodes()
        )

    def _put(self, arrays: list[NDArray[Any]]) -> Any:
        # As a result: its head comes first.
        return native(self._ray.put, [b"", *arrays])


def _timed(function: Callable[[T], R], pace: _Pace) -> Callable[[T], R]:
    """Return a function that measures itself."""

    def run(item: T) -> R:
        began = time.perf_counter()
        result = function(item)
        pace.compute, pace.computed = pace.compute + time.perf_counter() - began, pace.computed + 1
        pace.faded()
        return result

    return run
