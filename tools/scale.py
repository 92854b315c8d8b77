"""What a run would take with many workers: measured in parts here, foreseen for any number, and simulated.

``python tools/scale.py parts MODEL DATA`` runs once in a thread and prints what each map computes and moves.
``constants`` measures what sending costs with Ray. ``foresee parts.json`` prints times for 1 to 1,000 workers
by the formula of docs/scale.md, and by a simulation with latency, uneven batches and workers that end. ``ray
MODEL DATA --nodes 1 2 4`` runs on so many nodes of one core on this machine, and prints CPU seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import heapq
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import psutil

from eptq_onnx import Config, Data, quantize, workers
from eptq_onnx.parallel import Threads, Workers
from eptq_onnx.runtime import Session
from eptq_onnx.start import silent
from eptq_onnx.workers import ray_link, ray_nodes
from eptq_onnx.workers.base import Backend

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Part:
    """The maps of one function: how many, their items, seconds of compute, and bytes to and fro."""

    maps: int = 0
    items: int = 0
    compute: float = 0.0
    moved: int = 0


@dataclass(frozen=True)
class Constants:
    """Seconds for an item (driver and worker), a byte, latency, the start of a worker, and a map."""

    driver_call: float
    worker_call: float
    byte: float
    latency: float
    start: float = 0.0
    map: float = 0.0


def size_of(value: Any) -> int:
    """Return the bytes of all arrays in a value."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(size_of, value))
    return 0


class Recording(Workers):
    """One thread that notes what every map takes."""

    def __init__(self) -> None:
        self.parts: dict[str, Part] = defaultdict(Part)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """See `Workers.map`."""
        part = self.parts[getattr(function, "__qualname__", type(function).__name__)]
        part.maps += 1

        def run(item: T) -> R:
            began = time.thread_time()
            result = function(item)
            part.compute += time.thread_time() - began
            part.items, part.moved = part.items + 1, part.moved + size_of(item) + size_of(result)
            return result

        return Threads().map(run, items)


def config_of(arguments: argparse.Namespace, kind: str) -> Config:
    """Return the options of all runs."""
    return Config(
        bits=arguments.bits, steps=arguments.steps, workers=kind, threads=1, objective="integers",
        measure_speed=False,
    )  # fmt: skip


def data_of(arguments: argparse.Namespace) -> Data:
    """Return the samples of all runs."""
    return Data(arguments.data, samples=arguments.samples)


def parts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run once, and return the parts and the seconds of the driver."""
    recording = Recording()

    class RecordingBackend(Backend):
        name = "recording"
        about = "for measurements"

        def start(self) -> Workers:
            return recording

    workers.registered()["recording"] = RecordingBackend
    sessions, make = [0.0], Session.__init__

    def timed(self: Session, *given: Any, **options: Any) -> None:
        begun = time.thread_time()
        make(self, *given, **options)
        if self._moves:
            sessions[0] += time.thread_time() - begun

    Session.__init__ = timed  # type: ignore[method-assign]
    began = time.thread_time()
    quantize(arguments.model, data_of(arguments), config_of(arguments, "recording"), progress=silent)
    driver = time.thread_time() - began
    return {
        "driver": driver,
        "sessions": sessions[0],
        "parts": {name: asdict(part) for name, part in recording.parts.items()},
    }


class Watch:
    """CPU seconds of this process and all that it has started, ended ones included.

    What Ray's own services take is counted apart.
    """

    def __init__(self) -> None:
        self._known: dict[int, float] = {}
        self._services: dict[int, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            self.look()

    def look(self) -> None:
        """Note the times of all processes that are there."""
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                computes = process == own or "ray::Actor" in " ".join(process.cmdline())
                (self._known if computes else self._services)[process.pid] = times.user + times.system

    def total(self) -> tuple[float, float]:
        """Return the seconds so far: of what computes, and of Ray's services."""
        self.look()
        # A worker has the name of a service until it has work.
        services = [value for pid, value in self._services.items() if pid not in self._known]
        return sum(self._known.values()), sum(services)

    def of(self, name: str) -> float:
        """Return the seconds of the processes that are there and whose command holds ``name``."""
        found = 0.0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if name in " ".join(process.cmdline()):
                    times = process.cpu_times()
                    found += times.user + times.system
        return found


@contextlib.contextmanager
def cluster(nodes: int) -> Iterator[None]:
    """Start a head without cores and nodes of one core."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ.update({"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"})
    with ray_link.quiet():
        store = 2**29
        head = {"num_cpus": 0, "object_store_memory": store, "include_dashboard": False}
        found = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(nodes):
            found.add_node(num_cpus=1, object_store_memory=store)
        ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()
        found.shutdown()


def constants() -> Constants:
    """Measure what it takes to send an item, without and with 4 MB of numbers."""
    found = []
    ray_nodes.WORTH = 0.0
    with cluster(1), workers.employed("ray", 1):
        watch = Watch()
        start = watch.of("ray::Actor")
        from eptq_onnx.parallel import ordered_map

        for size in (1, 2**20):
            rows = np.zeros(size, np.float32)
            list(ordered_map(np.copy, [rows + k for k in range(8)]))
            count = 400 if size == 1 else 60
            driver, actor, began = time.process_time(), watch.of("ray::Actor"), time.perf_counter()
            for _ in ordered_map(np.copy, (rows + k for k in range(count))):
                pass
            spent = time.process_time() - driver, watch.of("ray::Actor") - actor, time.perf_counter() - began
            found.append([value / count for value in spent])
        # A map of its own for an item, with a session that the worker has.
        net = onnx.load(Path(__file__).parent.parent / "models" / "digits_mobile.onnx")
        session, image = Session(net), np.zeros((1, 1, 8, 8), np.float32)
        for repeat in range(60):
            if repeat == 10:
                before = time.process_time() + watch.of("ray::Actor")
            list(ordered_map(lambda given: session.run({session.inputs[0]: given}), [image]))
        per_map = (time.process_time() + watch.of("ray::Actor") - before) / 50
    (driver, actor, wall), (driver_large, actor_large, _) = found
    per_byte = (driver_large + actor_large - driver - actor) / 2**23
    return Constants(driver, actor, per_byte, wall, start, per_map - driver - actor)


def cpu_seconds(known: dict[str, Any], costs: Constants, count: int) -> float:
    """Return the CPU seconds of a run in which everything is sent to so many workers."""
    listed = [Part(**part) for part in known["parts"].values()]
    items, moved = sum(p.items for p in listed), sum(p.moved for p in listed)
    calls = items * (costs.driver_call + costs.worker_call)
    each = costs.start + known["sessions"]
    maps = sum(p.maps for p in listed) * costs.map
    sent = calls + moved * costs.byte + maps
    return float(known["driver"] + sum(p.compute for p in listed) + sent + count * each)


def foreseen(known: dict[str, Any], costs: Constants, count: int) -> float:
    """Return the seconds of a run with so many workers, each with a core of its own, by the formula."""
    total = known["driver"]
    for part in map(lambda p: Part(**p), known["parts"].values()):
        send = part.items * costs.driver_call + part.moved * costs.byte / 2
        each = part.compute / max(part.items, 1) + costs.worker_call
        least = part.maps * (costs.latency + each)
        sent = max(send, part.items * each / count, least)
        # What is done sooner here is not sent.
        total += min(sent, part.compute)
    return float(total)


def simulated(known: dict[str, Any], costs: Constants, count: int, mtbf: float, seed: int = 0) -> float:
    """Return the seconds of a run in a simulation.

    Batches take lognormal times (sigma 0.3), results are taken in order, at most twice as many as there are
    workers, and one, are ahead, and a worker ends on average every ``mtbf`` seconds: its batch is done again,
    and it is back after 5 s.
    """
    rng, total = np.random.default_rng(seed), known["driver"]
    for part in map(lambda p: Part(**p), known["parts"].values()):
        if not part.items:
            continue
        per_map = max(1, part.items // part.maps)
        each = part.compute / part.items
        send = costs.driver_call + part.moved / part.items * costs.byte / 2
        one = one_map(per_map, (each, send, costs), count, mtbf, rng)
        total += min(part.maps * one, part.compute)
    return float(total)


def one_map(
    items: int, times: tuple[float, float, Constants], count: int, mtbf: float, rng: np.random.Generator
) -> float:
    """Return the seconds of one map in the simulation."""
    each, send, costs = times
    free = [0.0] * min(count, items)
    heapq.heapify(free)
    done: list[float] = []
    clock = 0.0
    for k in range(items):
        if k > 2 * count:
            # In order: the item that leaves the window must be done.
            clock = max(clock, max(done[: k - 2 * count]) if k - 2 * count < 64 else done[k - 2 * count - 1])
        clock += send
        begin = max(heapq.heappop(free), clock + costs.latency / 2)
        work = each * float(rng.lognormal(-0.045, 0.3)) + costs.worker_call
        while float(rng.exponential(mtbf)) < work:
            begin += work + 5.0
        done.append(begin + work + costs.latency / 2)
        heapq.heappush(free, begin + work)
    return max(done)


def on_nodes(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run in threads and on nodes; return CPU and wall-clock seconds, and whether the bytes are the same."""
    found = []
    first = ""
    ray_nodes.WORTH = arguments.worth
    for nodes in (0, *arguments.nodes):
        with cluster(nodes) if nodes else contextlib.nullcontext():
            # The processes of Ray itself, its start apart.
            watch = Watch()
            before, began = watch.total(), time.perf_counter()
            kind = "ray" if nodes else "threads"
            made = quantize(arguments.model, data_of(arguments), config_of(arguments, kind), progress=silent)
            digest = hashlib.sha256(made.model.SerializeToString()).hexdigest()
            first = first or digest
            cpu, services = (round(b - a, 2) for a, b in zip(before, watch.total(), strict=True))
            spent = {"cpu": cpu, "services": services, "wall": round(time.perf_counter() - began, 2)}
            found.append({"nodes": nodes, **spent, "same": digest == first})
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """Do what the first argument says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["parts", "constants", "foresee", "ray"])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--samples", type=int, help="by default all")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--worth", type=float, default=0.0, help="0 sends everything")
    parser.add_argument("--constants", type=json.loads, help="as `constants` prints them")
    arguments = parser.parse_args()
    if arguments.what == "parts":
        print(json.dumps(parts(arguments), indent=2))
    elif arguments.what == "constants":
        print(json.dumps(asdict(constants())))
    elif arguments.what == "ray":
        on_nodes(arguments)
    else:
        known = json.loads(Path(arguments.model).read_text(encoding="utf-8"))
        costs = Constants(**arguments.constants)
        spent = {count: round(cpu_seconds(known, costs, count), 1) for count in (1, 2, 4)}
        print(f"CPU seconds with all sent, by workers: {spent}")
        for count in (1, 2, 4, 8, 16, 64, 256, 1000):
            calm, rough = (simulated(known, costs, count, mtbf) for mtbf in (1e9, 600.0))
            print(f"{count:5} workers: {foreseen(known, costs, count):8.1f} s by the formula, {calm:8.1f} s "
                  f"simulated, {rough:8.1f} s if each worker ends every 600 s")  # fmt: skip


if __name__ == "__main__":
    main()
