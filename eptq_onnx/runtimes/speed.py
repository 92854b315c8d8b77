"""Whether the written model runs faster than the float model on this machine, and if not, which operators
cost the time.

Both models run in onnxruntime with the options that a user gets by default, in turn, so that whatever else
the machine does falls on both. The ratio is the median over pairs of measurements; what it is told from is
noise, by the interval of that median.
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
"""Seconds of measurement, warm-up not counted; a pair that has begun is finished."""
_PAIRS = (10, 41)
"""Fewest and most pairs. Ten are the fewest whose range encloses the median at the confidence wanted."""
_TAIL = 0.001
"""Probability that the median lies beyond one end of its interval. Small, for the interval is looked at after
every pair."""
_TURN, _REPEATS = 0.02, 20
"""Seconds that a turn of one model lasts about, and the most runs in it. The fastest counts: others were
interrupted."""
_MARGIN = 1.05
"""A ratio within this factor of 1 is no difference to a user."""
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
"""Float operator that onnxruntime's own operators stand for; QLinearX, FusedX and QX stand for X."""

Run = Callable[[], object]


def measure(model: ModelProto, quantized: ModelProto, feeds: Feeds, samples: int) -> Speed:
    """Run both models in turn, for a second or two.

    Parameters
    ----------
    model, quantized : ModelProto
        The model as it was given, and as it is written.
    feeds : dict of str to ndarray
        What one run takes.
    samples : int
        Samples in it.

    Raises
    ------
    ModelError
        If onnxruntime refuses a model, or if one run takes longer than `LONGEST_RUN`.
    """
    sessions = [Session(m, threads=0) for m in (model, quantized)]
    run_float, run_quantized = (_bound(session, feeds) for session in sessions)
    speed = compare(run_float, run_quantized, samples)
    # Profiles come from sessions of their own: timing operators slows a session down.
    del sessions, run_float, run_quantized
    if speed.pace is Pace.FASTER:
        return speed
    return replace(speed, operators=operator_times(profile(model, feeds), profile(quantized, feeds)))


def compare(
    run_float: Run, run_quantized: Run, samples: int, clock: Callable[[], float] = time.perf_counter
) -> Speed:
    """Time two functions in turn.

    Parameters
    ----------
    run_float, run_quantized : callable
        One run each.
    samples : int
        Samples in a run.
    clock : callable
        Seconds.

    Raises
    ------
    ModelError
        If one run takes longer than `LONGEST_RUN`.
    """
    longest = 0.0
    for run in (run_float, run_quantized):
        first = _seconds(run, 1, clock)  # allocates, and packs weights
        second = _seconds(run, 1, clock) if first < LONGEST_RUN else first
        if second > LONGEST_RUN:
            raise ModelError(f"one run takes {second:.1f} s, and at most {LONGEST_RUN:g} s are spent on each")
        longest = max(longest, second)
    # As many for both: the fastest of more runs is faster.
    repeats = min(_REPEATS, math.ceil(_TURN / longest))
    times: list[tuple[float, float]] = []
    began = clock()
    while len(times) < _PAIRS[0] or (
        len(times) < _PAIRS[1] and clock() - began < _BUDGET and _pace(*_interval(times)) is None
    ):
        turns = [(0, run_float), (1, run_quantized)]
        pair = [0.0, 0.0]
        # Who goes first changes: a clock that slows down, say, favours neither.
        for k, run in turns if len(times) % 2 == 0 else reversed(turns):
            run()  # threads of the other session still spin, and its weights are in the caches
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
    """Time of the fastest of several runs in a row."""
    times = []
    for _ in range(repeats):
        began = clock()
        run()
        times.append(clock() - began)
    return max(min(times), 1e-9)


def _interval(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Interval of the median ratio: the order statistics that enclose it at a confidence of at least 99.8
    %."""
    ratios = sorted(q / f for f, q in times)
    n, left, tail = len(ratios), 0, 0.5 ** len(ratios)
    while left + 1 < n / 2 and tail + math.comb(n, left + 1) * 0.5**n <= _TAIL:
        left += 1
        tail += math.comb(n, left) * 0.5**n
    return ratios[left], ratios[n - 1 - left]


def _pace(low: float, high: float) -> Pace | None:
    """What an interval of the ratio says; None if it does not decide."""
    if low > _MARGIN:
        return Pace.SLOWER
    if high < 1 / _MARGIN:
        return Pace.FASTER
    return Pace.SAME if low >= 1 / _MARGIN and high <= _MARGIN else None


def profile(model: ModelProto, feeds: Feeds) -> dict[str, float]:
    """Seconds of one run by operator, as `operator_seconds` names them."""
    with scratch.folder() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = Session(model, threads=0, profile=Path(folder) / "profile", save_optimized=optimized)
        run, count, began = _bound(session, feeds), 0, time.perf_counter()
        while count < 3 or time.perf_counter() - began < _PROFILED:
            run()
            count += 1
        # onnxruntime writes the names of nodes as they are, control characters and all.
        events = json.loads(
            session.end_profiling().read_text(encoding="utf-8", errors="replace"), strict=False
        )
        graph = onnx.load(optimized, load_external_data=False).graph
        return operator_seconds(events, quantizer_labels(graph), count)


def operator_seconds(
    events: Iterable[Mapping[str, Any]], labels: Mapping[str, str], runs: int
) -> dict[str, float]:
    """Seconds of one run by operator.

    Parameters
    ----------
    events : iterable of mappings
        onnxruntime's profile.
    labels : mapping of str to str
        What to call some nodes, by node name; others by the float operator that they stand for.
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
        # A median a node: one that another process interrupted does not count. In a loop a node runs several
        # times a run.
        found[label] += float(np.median(times)) * len(times) / runs
    return dict(found)


def _own_seconds(events: Sequence[Mapping[str, Any]]) -> Iterable[tuple[Mapping[str, Any], float]]:
    """Each event with its time less that of the events inside it: an If, Loop or Scan contains the nodes of
    its body."""
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
    """Float operator that a kernel of onnxruntime's stands for."""
    return _QUANTIZERS if kind in QUANTIZERS else _KERNELS.get(kind) or _PREFIX.sub("", kind)


def quantizer_labels(graph: onnx.GraphProto) -> dict[str, str]:
    """What to call each quantizer, by node name: after the operators that it quantizes the results of, or
    dequantizes for."""
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
    """Both profiles side by side, what the quantized model spends more on first."""
    rows = [
        OperatorTime(name, exact.get(name, 0.0), quantized.get(name, 0.0)) for name in {**exact, **quantized}
    ]
    return tuple(sorted(rows, key=lambda r: (r.float_seconds - r.quantized_seconds, r.operator)))
