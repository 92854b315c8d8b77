"""Incremental execution of a model up to one tensor after the other, each node run once for all samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TypeProto, helper

from eptq_onnx.execute.pieces import piece
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.parallel import ordered_map
from eptq_onnx.proto.bodies import node_reads
from eptq_onnx.runtime import ExactSession

_MEMORY = 3 * 2**30
"""Limit in bytes on the tensors of all walks together, unless the user's memory limit is tighter."""


class Walk:
    """Runs a model incrementally, up to one requested tensor after the other.

    Only tensors that a later node reads are kept. A constant may be set as long as no node that reads it has
    run, so that a layer's weight can depend on the layer's input.

    Parameters
    ----------
    model : ModelProto
        With named nodes and known element types; it is not changed.
    batches : sequence of Feeds
        Inputs of the model, one entry per batch.
    integers : bool
        False to compute in float between quantizers, as the ONNX operators are defined.
    """

    def __init__(self, model: ModelProto, batches: Sequence[Feeds], *, integers: bool = True) -> None:
        self._view = GraphView(model)
        self._integers = integers
        self._live: list[Feeds] = [dict(feeds) for feeds in batches]
        self._waiting: dict[str, NodeProto] = {n.name: n for n in self._view.nodes}
        self._replaced: Feeds = {}

    def set_constant(self, name: str, value: NDArray[Any]) -> None:
        """Use a new value for a constant from now on."""
        self._replaced[name] = value

    def put(self, values: Mapping[str, Sequence[NDArray[Any]]]) -> None:
        """Replace the values of tensors that were reached, for the nodes that have not run.

        Parameters
        ----------
        values : mapping of str to sequence of ndarray
            One array for each batch.
        """
        for name, arrays in values.items():
            if self._is_awaited(name):
                for feeds, value in zip(self._live, arrays, strict=True):
                    feeds[name] = value

    def reach(self, tensor: str) -> list[NDArray[Any]]:
        """Run the model up to a tensor and return its value for each batch.

        Raises
        ------
        ModelError
            If onnxruntime cannot run the nodes in between.
        """
        nodes = self._needed(tensor)
        if nodes:
            self._run(nodes, tensor)
        values = [feeds[tensor] for feeds in self._live]
        self._forget()
        return values

    def _known(self, name: str) -> bool:
        return name in self._replaced or name in self._live[0]

    def _needed(self, tensor: str) -> list[NodeProto]:
        """Return the nodes upstream of ``tensor`` that have not run, in order."""
        chosen: set[str] = set()
        queue = [tensor]
        while queue:
            name = queue.pop()
            node = self._view.producer.get(name)
            if node is None or self._known(name) or node.name in chosen or node.name not in self._waiting:
                continue
            chosen.add(node.name)
            queue.extend(node_reads(node))
        return [n for n in self._view.nodes if n.name in chosen]

    def _run(self, nodes: list[NodeProto], wanted: str) -> None:
        made = {o for n in nodes for o in n.output if o}
        for node in nodes:
            del self._waiting[node.name]
        kept = [o for o in made if o == wanted or self._is_awaited(o)]
        read = dict.fromkeys(i for n in nodes for i in node_reads(n) if i not in made)
        inputs = [i for i in read if self._known(i)]
        session = ExactSession(
            piece(self._view, nodes, {i: self._type(i) for i in inputs}, {o: self._type(o) for o in kept}),
            integers=self._integers,
        )

        replaced = {i: self._replaced[i] for i in inputs if i in self._replaced}
        own = [i for i in inputs if i not in replaced]

        def run(feeds: Feeds) -> Feeds:
            return session.run({**feeds, **replaced}, kept)

        parts = ({i: feeds[i] for i in own} for feeds in self._live)
        for feeds, values in zip(self._live, ordered_map(run, parts), strict=True):
            feeds.update(values)

    def _type(self, name: str) -> int | TypeProto:
        value = self._replaced.get(name, self._live[0].get(name))
        if isinstance(value, np.ndarray) and value.dtype != object:
            return helper.np_dtype_to_tensor_dtype(value.dtype)
        return self._view.kind(name)

    def _forget(self) -> None:
        """Drop the values that no waiting node reads."""
        for values in (*self._live, self._replaced):
            for name in [t for t in values if not self._is_awaited(t)]:
                del values[name]

    def _is_awaited(self, tensor: str) -> bool:
        """Return True if a node that has not run reads the tensor."""
        return any(n.name in self._waiting for n in self._view.consumers[tensor])


def affordable_batches(model: ModelProto, walks: int, max_memory: int | None) -> int:
    """Return how many batches, at least 1, several concurrent walks can hold in memory.

    They may take 3 GiB together, or a quarter of the memory limit if that is less.

    Parameters
    ----------
    model : ModelProto
        With shapes of one batch.
    walks : int
        Number of concurrent walks.
    max_memory : int or None
        Memory limit in bytes.
    """
    memory = _MEMORY if max_memory is None else min(_MEMORY, max_memory // 4)
    return max(1, memory // max(1, walks * peak_bytes(model)))


def peak_bytes(model: ModelProto) -> int:
    """Return the peak number of bytes of live tensors when the nodes run in order.

    Every element counts 4 bytes; tensors of unknown shape count as 0.

    Parameters
    ----------
    model : ModelProto
        With shapes of one batch.
    """
    view = GraphView(model)
    last = {name: k for k, node in enumerate(view.nodes) for name in node_reads(node)}
    sizes = {
        name: 4 * int(np.prod(view.static_shape(name) or (0,))) for name in (*view.inputs, *view.producer)
    }
    live = sum(sizes[name] for name in view.inputs)
    peak = live
    for k, node in enumerate(view.nodes):
        live += sum(sizes[o] for o in node.output if o)
        peak = max(peak, live)
        live -= sum(sizes[i] for i in dict.fromkeys(node_reads(node)) if i in sizes and last[i] == k)
        live -= sum(sizes[o] for o in node.output if o and o not in last)
    return peak
