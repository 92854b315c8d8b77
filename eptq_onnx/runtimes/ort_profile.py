"""Read the profiles that onnxruntime's bindings for all languages write as Chrome trace events."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from eptq_onnx.errors import ModelError, one_line
from eptq_onnx.runtimes.base import Kernel, NodeTime, fastest
from eptq_onnx.runtimes.ort_graph import FIRST, type_name

Events: TypeAlias = Sequence[Mapping[str, Any]]
_RUN, _END = "model_run", "_kernel_time"


def parse(text: str, last: int | None = None) -> Events:
    """Return the node events in a profile.

    Parameters
    ----------
    text : str
    last : int, optional
        Number of runs to keep, counted from the end; by default all runs.

    Raises
    ------
    ModelError
        If the text is not a profile.
    """
    try:
        # onnxruntime writes node names unescaped, including control characters.
        events = json.loads(text, strict=False)
    except ValueError as e:
        raise ModelError(f"onnxruntime's profile cannot be read: {one_line(e)}") from e
    starts = sorted(float(e["ts"]) for e in events if e.get("name") == _RUN)
    since = starts[-last] if last is not None else 0.0
    return [
        e
        for e in events
        if e.get("cat") == "Node" and str(e.get("name", "")).endswith(_END) and float(e["ts"]) >= since
    ]


def node_of(event: Mapping[str, Any]) -> str:
    """Return the name of an event's node."""
    return str(event["name"]).removesuffix(_END)


def operator_of(event: Mapping[str, Any]) -> str:
    """Return the operator of an event's node."""
    return str(event.get("args", {}).get("op_name", ""))


def data_type(event: Mapping[str, Any]) -> str:
    """Return the type of an event's first data input, as the node's precision; empty if unknown."""
    types = [next(iter(value), "") for value in event.get("args", {}).get("input_type_shape", [])]
    place = FIRST.get(operator_of(event), 0)
    return type_name(types[place]) if place < len(types) else ""


def node_times(events: Events, kernels: Iterable[Kernel], runs: int) -> tuple[NodeTime, ...]:
    """Return the time of each node in one run.

    Parameters
    ----------
    events : sequence of mappings
        Node events; see `parse`.
    kernels : iterable of Kernel
        The nodes to return times for.
    runs : int
        Number of runs in the profile.
    """
    spent: dict[str, list[float]] = defaultdict(list)
    for event, seconds in _own_seconds(events):
        spent[node_of(event)].append(seconds)
    return tuple(
        NodeTime(kernel, fastest(times, runs)) for kernel in kernels if (times := spent.get(kernel.node))
    )


def _own_seconds(events: Events) -> Iterable[tuple[Mapping[str, Any], float]]:
    """Yield each event with its own seconds, without the events nested in it.

    The event of an If, Loop or Scan contains those of its body.
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
