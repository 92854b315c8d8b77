"""Time small models in onnxruntime kernel by kernel, and find the memory layouts that they use."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, helper

from eptq_onnx import runtimes, scratch
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.outcome import Speed
from eptq_onnx.placement import Representation, Way
from eptq_onnx.runtime import Session, load
from eptq_onnx.runtimes import ort_profile
from eptq_onnx.runtimes.attribute import Attribution, attribute
from eptq_onnx.runtimes.speed import BRIEF, Effort, latency
from eptq_onnx.targets.machine import cpuinfo

_RUNS = (8, 200)
"""Minimum and maximum number of runs of a piece."""
_BEST = 3
"""Only the least interrupted third of the runs counts."""
_SEED = 0
_LONG = Effort(seconds=2 * BRIEF.seconds, pairs=3 * BRIEF.pairs)
"""Effort of comparing whole models where time allows: choices differ by only a few per cent."""
_SHORT = BRIEF.seconds / 2
"""Least seconds of a comparison of whole models."""

Surround = Callable[[ModelProto, bool], ModelProto | None]
"""Puts a piece between float convolutions, or integer ones if the flag is True; None if it cannot."""
_CONVERSIONS = frozenset({"ReorderInput", "ReorderOutput", "Transpose", "QuantizeLinear", "DequantizeLinear"})
_SMALL = frozenset(
    {onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.INT16, onnx.TensorProto.UINT16}
)


@dataclass(frozen=True)
class Pace:
    """How a piece is timed.

    Parameters
    ----------
    threads : int
    seconds : float
        Time limit of the runs beyond the minimum number.
    """

    threads: int
    seconds: float


def ways_of(model: ModelProto, surround: Surround, pace: Pace, known: Feeds | None = None) -> tuple[Way, ...]:
    """Return the ways in which onnxruntime computes a piece, with their times; at least one.

    The first way is that of the piece alone. If onnxruntime changes no layout in it, the piece is also timed
    between convolutions, because it may run in their layout.

    Parameters
    ----------
    model : ModelProto
        The piece, with fixed shapes.
    surround : callable
    pace : Pace
    known : dict of str to ndarray, optional
        Values of inputs that must not be random.

    Raises
    ------
    ModelError
        If onnxruntime rejects the piece.
    """
    times, graph = kernel_times(model, pace, known)
    moves = _count(model.graph, "Transpose") > 0
    reads, makes = _ends(model, graph, moves)
    ignored = _ignored(graph, moves)
    ways = [Way(reads, makes, sum(t for name, t in times.items() if name not in ignored))]
    if ignored or moves:
        return tuple(ways)
    convolutions = _count(model.graph, "Conv")
    for integers in (False, True):
        between = surround(model, integers)
        if between is None or convolutions:
            continue
        ends = _count(between.graph, "Conv")
        times, graph = kernel_times(between, pace, known)
        plain = {n.name for n in graph.node if n.op_type in _CONVERSIONS or "Conv" in n.op_type}
        seconds = sum(t for name, t in times.items() if name not in plain)
        made, reordered = _count(graph, "ReorderOutput"), _count(graph, "ReorderInput")
        if not integers and made and made + reordered <= ends:
            ways.append(Way(Representation.FLOAT_BLOCKED, Representation.FLOAT_BLOCKED, seconds))
        if integers and 0 < _count(graph, "Transpose") <= ends and _holds(graph, reads, makes):
            ways.append(Way(_LAST[reads], _LAST[makes], seconds))
    return tuple(ways)


def _holds(graph: GraphProto, reads: Representation, makes: Representation) -> bool:
    """Return False if onnxruntime turned a float piece between quantizers into an integer kernel."""
    return (reads.is_integer and makes.is_integer) or _count(graph, "DequantizeLinear") > 0


def kernel_times(
    model: ModelProto, pace: Pace, known: Feeds | None = None, *, optimize: bool = True
) -> tuple[dict[str, float], GraphProto]:
    """Return the time of each node in seconds, and the optimized graph."""
    with scratch.folder() as folder:
        path = Path(folder) / "optimized.onnx"
        session = Session(
            model,
            optimize=optimize,
            threads=pace.threads,
            profile=Path(folder) / "profile",
            save_optimized=path,
        )
        feeds = session.taken({**drawn(model), **(known or {})})
        lost: list[float] = []
        began = time.process_time()
        while len(lost) < _RUNS[0] or (len(lost) < _RUNS[1] and time.process_time() - began < pace.seconds):
            start = time.perf_counter(), time.thread_time()
            session.run(feeds)
            taken = time.perf_counter() - start[0], time.thread_time() - start[1]
            # Waiting threads spin, so only with a single thread does its CPU time show the interruptions.
            lost.append(max(0.0, taken[0] - taken[1]) if pace.threads == 1 else 0.0)
        events = ort_profile.parse(session.end_profiling().read_text(encoding="utf-8", errors="replace"))
        spent: dict[str, list[float]] = defaultdict(list)
        for event in events:
            spent[ort_profile.node_of(event)].append(float(event["dur"]) * 1e-6)
        return undisturbed(spent, lost), onnx.load(path, load_external_data=False).graph


def undisturbed(spent: Mapping[str, Sequence[float]], lost: Sequence[float]) -> dict[str, float]:
    """Estimate the time of each node, in seconds, without interruptions by other processes.

    Only the least interrupted runs count. The longest kernel of a run was most likely the interrupted one, so
    the lost time is subtracted from it.

    Parameters
    ----------
    spent : dict of str to sequence of float
        Seconds of each node in each run.
    lost : sequence of float
        Seconds for which each run was interrupted.
    """
    if not spent:
        return {}
    names = list(spent)
    times = np.array([spent[name] for name in names])
    best = np.argsort(lost, kind="stable")[: max(1, len(lost) // _BEST)]
    times = times[:, best]
    longest = times.argmax(axis=0)
    places = np.arange(len(best))
    times[longest, places] = np.maximum(times[longest, places] - np.asarray(lost)[best], 0.0)
    return dict(zip(names, np.median(times, axis=1).tolist(), strict=True))


def drawn(model: ModelProto) -> Feeds:
    """Return random values for all inputs of fixed shape."""
    random = np.random.default_rng(_SEED)
    feeds: Feeds = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = [d.dim_value for d in tensor.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if np.issubdtype(dtype, np.floating):
            feeds[value.name] = random.standard_normal(shape).astype(dtype)
        elif dtype == np.bool_:
            feeds[value.name] = random.random(shape) < 0.5
        else:
            low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.itemsize == 1 else (0, 1)
            feeds[value.name] = random.integers(low, high, shape, endpoint=True).astype(dtype)
    return feeds


def _count(graph: GraphProto, op_type: str) -> int:
    return sum(n.op_type == op_type for n in graph.node)


def _ignored(graph: GraphProto, moves: bool) -> set[str]:
    """Return the names of the nodes that change layouts, except Transposes if the piece has its own."""
    kinds = {"ReorderInput", "ReorderOutput", *(() if moves else ("Transpose",))}
    return {n.name for n in graph.node if n.op_type in kinds}


def _ends(model: ModelProto, graph: GraphProto, moves: bool) -> tuple[Representation, Representation]:
    """Return the representations that a piece reads and produces, inside the layout changes at its ends."""
    readers: dict[str, set[str]] = defaultdict(set)
    makers: dict[str, str] = {}
    for node in graph.node:
        for name in node.input:
            readers[name].add(node.op_type)
        for name in node.output:
            makers[name] = node.op_type
    inputs, outputs = model.graph.input, model.graph.output
    before = {op for v in inputs for op in readers[v.name]}
    behind = {makers.get(v.name, "") for v in outputs}
    kinds = [{int(v.type.tensor_type.elem_type) for v in values} for values in (inputs, outputs)]
    return _representation(kinds[0], before, moves), _representation(kinds[1], behind, moves)


def _representation(kinds: set[int], neighbours: set[str], moves: bool) -> Representation:
    last = "Transpose" in neighbours and not moves
    if kinds & _SMALL:
        return Representation.INTEGERS_LAST if last else Representation.INTEGERS
    if neighbours & {"ReorderInput", "ReorderOutput"}:
        return Representation.FLOAT_BLOCKED
    return Representation.FLOAT_LAST if last else Representation.FLOAT


_LAST: Mapping[Representation, Representation] = {
    Representation.FLOAT: Representation.FLOAT_LAST,
    Representation.INTEGERS: Representation.INTEGERS_LAST,
}


class Stopwatch:
    """Time models in the installed onnxruntime.

    Parameters
    ----------
    threads : int
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @property
    def runtime(self) -> str:
        """Return the name and version of the runtime."""
        return f"onnxruntime {load().__version__}"

    @property
    def machine(self) -> str:
        """Return what identifies the speed of this machine; see `machine`."""
        return machine()

    def now(self) -> float:
        """Return the CPU time of this process, for time limits that other processes do not affect."""
        return time.process_time()

    def ways(self, model: ModelProto, surround: Surround, seconds: float, known: Feeds) -> tuple[Way, ...]:
        """See `ways_of`."""
        return ways_of(model, surround, Pace(self.threads, seconds), known)

    def conversions(self, model: ModelProto, seconds: float) -> dict[str, float]:
        """Return the seconds of each node of a model that onnxruntime does not optimize."""
        return kernel_times(model, Pace(self.threads, seconds), optimize=False)[0]

    def compare(self, base: ModelProto, other: ModelProto, feeds: Feeds, seconds: float) -> Speed:
        """Time two whole models in turn, for about some seconds; see `eptq_onnx.runtimes.speed.latency`."""
        effort = replace(_LONG, seconds=min(_LONG.seconds, max(_SHORT, seconds)))
        return latency(runtimes.make(), (base, other), feeds, self.threads, effort)

    def profile(self, exact: ModelProto, quantized: ModelProto, feeds: Feeds) -> Attribution:
        """Profile two whole models; see `eptq_onnx.runtimes.attribute.attribute`."""
        return attribute(runtimes.make(), (exact, quantized), feeds, threads=self.threads)


@cache
def machine() -> str:
    """Return the processor's name, the number of cores, and a digest of the CPU's feature flags."""
    facts = {"model name": platform.processor() or platform.machine(), "flags": ""}
    for line in cpuinfo().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in facts:
            facts[key.strip()] = value.strip()
    digest = hashlib.sha256(facts["flags"].encode()).hexdigest()[:8]
    return f"{facts['model name']}, {os.cpu_count()} cores, instruction sets {digest}"
