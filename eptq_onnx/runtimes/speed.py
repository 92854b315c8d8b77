"""Measure whether the written model is faster than the float model here, and which operators cost time.

Both models run in onnxruntime with default options, in turn, so that other load on the machine affects both.
The ratio is the median over pairs of measurements; the interval of that median says whether it differs from
noise.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from eptq_onnx import scratch
from eptq_onnx.errors import ModelError
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.proto.bodies import all_nodes
from eptq_onnx.records import OperatorTime, Pace, Speed
from eptq_onnx.runtime import Session

LONGEST_RUN = 2.0
"""Seconds of one run above which nothing is measured."""
_BUDGET = 1.5
"""Seconds of measurement without warm-up; a pair that has begun is finished."""
_PAIRS = (10, 41)
"""Fewest and most pairs; the range of ten is the first to enclose the median with enough confidence."""
_TAIL = 0.001
"""Probability that the median lies beyond one end of its interval; small because every pair is a new test."""
_TURN, _REPEATS = 0.02, 20
"""Approximate seconds of one model's turn, and the most runs in it.

The fastest run counts, since others were interrupted.
"""
_MARGIN = 1.05
"""Factor around 1 within which a ratio makes no difference to a user."""
_PROFILED = 0.1
"""Seconds of profiled runs of each model."""

QUANTIZERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_QUANTIZERS = "QuantizeLinear/DequantizeLinear"
_PREFIX = re.compile(r"^(QLinear|Fused|Q(?=[A-Z]))")
_KERNELS = {
    "ConvInteger": "Conv",
    "MatMulInteger": "MatMul",
    "MatMulIntegerToFloat": "MatMul",
    "DynamicQuantizeMatMul": "MatMul",
    "MatMulNBits": "MatMul",
    "ReorderInput": "layout",
    "ReorderOutput": "layout",
}
"""Float operators that onnxruntime's own operators implement; QLinearX, FusedX and QX implement X."""

Run = Callable[[], object]


def measure(model: ModelProto, quantized: ModelProto, feeds: Feeds, samples: int) -> Speed:
    """Run both models in turn, for a second or two.

    Parameters
    ----------
    model, quantized : ModelProto
        The original and the written model.
    feeds : dict of str to ndarray
        Feeds of one run.
    samples : int
        Samples in these feeds.

    Raises
    ------
    ModelError
        If onnxruntime refuses a model, or if one run takes longer than `LONGEST_RUN`.
    """
    sessions = [Session(m, threads=0) for m in (model, quantized)]
    run_float, run_quantized = (_bound(session, feeds) for session in sessions)
    speed = compare(run_float, run_quantized, samples)
    # Profiles come from separate sessions, because timing operators slows a session down.
    del sessions, run_float, run_quantized
    if speed.pace is Pace.FASTER:
        return speed
    return replace(speed, operators=operator_times(profile(model, feeds), profile(quantized, feeds)))


def compare(
    run_float: Run,
    run_quantized: Run,
    samples: int,
    clock: Callable[[], float] = time.perf_counter,
    patience: int = 1,
) -> Speed:
    """Time two functions in turn.

    Parameters
    ----------
    run_float, run_quantized : callable
        One run each.
    samples : int
        Samples per run.
    clock : callable
        Returns seconds.
    patience : int
        Factor on the time and the number of pairs that are spent on small differences.

    Raises
    ------
    ModelError
        If one run takes longer than `LONGEST_RUN`.
    """
    longest = 0.0
    for run in (run_float, run_quantized):
        first = _seconds(run, 1, clock)  # allocates memory and packs weights
        second = _seconds(run, 1, clock) if first < LONGEST_RUN else first
        if second > LONGEST_RUN:
            raise ModelError(f"one run takes {second:.1f} s, and at most {LONGEST_RUN:g} s are spent on each")
        longest = max(longest, second)
    # The same number for both, because the minimum of more runs is smaller.
    repeats = min(_REPEATS, math.ceil(_TURN / longest))
    times: list[tuple[float, float]] = []
    began = clock()
    while len(times) < _PAIRS[0] or (
        len(times) < patience * _PAIRS[1]
        and clock() - began < patience * _BUDGET
        and _pace(*_interval(times)) is None
    ):
        turns = [(0, run_float), (1, run_quantized)]
        pair = [0.0, 0.0]
        # The order alternates, so that a drifting clock frequency, for instance, favours neither.
        for k, run in turns if len(times) % 2 == 0 else reversed(turns):
            run()  # warm-up: the other session's threads still spin, and its weights fill the caches
            pair[k] = _seconds(run, repeats, clock)
        times.append((pair[0], pair[1]))
    low, high = _interval(times)
    medians = np.median(np.array(times), axis=0)
    return Speed(
        pace=_pace(low, high) or Pace.SAME,
        float_seconds=float(medians[0]),
        quantized_seconds=float(medians[1]),
        ratio=float(np.median([q / f for f, q in times])),
        low=low,
        high=high,
        pairs=len(times),
        samples=samples,
    )


def _bound(session: Session, feeds: Feeds) -> Run:
    own = session.taken(feeds)
    return lambda: session.run(own)


def _seconds(run: Run, repeats: int, clock: Callable[[], float]) -> float:
    """Return the time of the fastest of several consecutive runs."""
    times = []
    for _ in range(repeats):
        began = clock()
        run()
        times.append(clock() - began)
    return max(min(times), 1e-9)


def _interval(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the interval of the median ratio.

    Its ends are the order statistics that enclose the median with a confidence of at least 99.8 %.
    """
    ratios = sorted(q / f for f, q in times)
    n, left, tail = len(ratios), 0, 0.5 ** len(ratios)
    while left + 1 < n / 2 and tail + math.comb(n, left + 1) * 0.5**n <= _TAIL:
        left += 1
        tail += math.comb(n, left) * 0.5**n
    return ratios[left], ratios[n - 1 - left]


def _pace(low: float, high: float) -> Pace | None:
    """Return the pace that an interval of the ratio implies; None if it is undecided."""
    if low > _MARGIN:
        return Pace.SLOWER
    if high < 1 / _MARGIN:
        return Pace.FASTER
    return Pace.SAME if low >= 1 / _MARGIN and high <= _MARGIN else None


def profile(model: ModelProto, feeds: Feeds) -> dict[str, float]:
    """Return the seconds per run of each operator, with the names of `operator_seconds`."""
    with scratch.folder() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = Session(model, threads=0, profile=Path(folder) / "profile", save_optimized=optimized)
        run, count, began = _bound(session, feeds), 0, time.perf_counter()
        while count < 3 or time.perf_counter() - began < _PROFILED:
            run()
            count += 1
        # onnxruntime writes node names unescaped, including control characters.
        events = json.loads(
            session.end_profiling().read_text(encoding="utf-8", errors="replace"), strict=False
        )
        graph = onnx.load(optimized, load_external_data=False).graph
        return operator_seconds(events, quantizer_labels(graph), count)


def operator_seconds(
    events: Iterable[Mapping[str, Any]], labels: Mapping[str, str], runs: int
) -> dict[str, float]:
    """Return the seconds per run of each operator.

    Parameters
    ----------
    events : iterable of mappings
        onnxruntime's profile.
    labels : mapping of str to str
        Labels of some nodes, by node name; other nodes are named after the float operator they implement.
    runs : int
        Runs of the model in this profile.
    """
    kernels = [
        e for e in events if e.get("cat") == "Node" and str(e.get("name", "")).endswith("_kernel_time")
    ]
    spent: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event, seconds in _own_seconds(kernels):
        node, kind = event["name"].removesuffix("_kernel_time"), str(event.get("args", {}).get("op_name", ""))
        spent[node, labels.get(node, stands_for(kind))].append(seconds)
    found: dict[str, float] = defaultdict(float)
    for (_, label), times in spent.items():
        # Use the median of each node, which ignores interruptions by other processes. In a loop, a node runs
        # several times per run.
        found[label] += float(np.median(times)) * len(times) / runs
    return dict(found)


def _own_seconds(events: Sequence[Mapping[str, Any]]) -> Iterable[tuple[Mapping[str, Any], float]]:
    """Yield each event with its time minus that of the events nested in it.

    An If, Loop or Scan contains the nodes of its body.
    """
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        threads[event.get("tid")].append(event)
    for own in threads.values():
        ordered = sorted(own, key=lambda e: (float(e["ts"]), -float(e["dur"])))
        inside = [0.0] * len(ordered)
        open_events: list[int] = []
        for k, event in enumerate(ordered):
            while open_events and float(event["ts"]) >= float(ordered[open_events[-1]]["ts"]) + float(
                ordered[open_events[-1]]["dur"]
            ):
                open_events.pop()
            if open_events:
                inside[open_events[-1]] += float(event["dur"])
            open_events.append(k)
        for event, nested in zip(ordered, inside, strict=True):
            yield event, max(float(event["dur"]) - nested, 0.0) * 1e-6


def stands_for(kind: str) -> str:
    """Return the float operator that a kernel of onnxruntime implements."""
    return _QUANTIZERS if kind in QUANTIZERS else _KERNELS.get(kind) or _PREFIX.sub("", kind)


def quantizer_labels(graph: onnx.GraphProto) -> dict[str, str]:
    """Return a label for each quantizer, by node name.

    It names the operators whose results are quantized, or for which values are dequantized.
    """
    nodes = list(all_nodes(graph))
    makers = {o: n for n in nodes for o in n.output}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in nodes:
        for name in node.input:
            readers[name].append(node)
    labels = {}
    for node in nodes:
        if node.op_type in QUANTIZERS and node.name:
            inner = (
                readers[node.output[0]]
                if node.op_type == "DequantizeLinear"
                else [makers[i] for i in node.input[:1] if i in makers]
            )
            kinds = sorted({stands_for(n.op_type) for n in inner if n.op_type not in QUANTIZERS})
            place = "an output" if node.op_type == "DequantizeLinear" else "an input"
            labels[node.name] = (
                f"{_QUANTIZERS} around {' and '.join(kinds)}" if kinds else f"{_QUANTIZERS} at {place}"
            )
    return labels


def operator_times(exact: Mapping[str, float], quantized: Mapping[str, float]) -> tuple[OperatorTime, ...]:
    """Return both profiles side by side, largest increase first."""
    rows = [
        OperatorTime(name, exact.get(name, 0.0), quantized.get(name, 0.0)) for name in {**exact, **quantized}
    ]
    return tuple(sorted(rows, key=lambda r: (r.float_seconds - r.quantized_seconds, r.operator)))
