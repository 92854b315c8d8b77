"""Incremental execution of a model up to one tensor after the other, each node run once for all samples."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TypeProto, helper, numpy_helper

from eptq_onnx.execute.pieces import piece
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.parallel import ordered_map
from eptq_onnx.proto.bodies import node_reads
from eptq_onnx.runtime import KeptSession

_MEMORY = 512 * 2**20
"""Limit in bytes on the tensors of all walks together, unless the user's memory limit is tighter.

With the program, the libraries and the samples, a run stays below 1.7 GB.
"""


class Walk:
    """Runs a model incrementally, up to one requested tensor after the other.

    Only tensors that a later node reads are kept. A constant may be set as long as no node that reads it has
    run, so that a layer's weight can depend on the layer's input. Batches may leave where tensors are large,
    and others join where they are small again.

    Parameters
    ----------
    model : ModelProto
        With named nodes and known element types; it is not changed.
    batches : sequence of Feeds
        Inputs of the model, one entry per batch.
    integers : bool
        False to compute in float between quantizers, as the ONNX operators are defined.
    grows : bool
        True to keep constants that are set, so that batches may join.
    """

    def __init__(
        self, model: ModelProto, batches: Iterable[Feeds], *, integers: bool = True, grows: bool = False
    ) -> None:
        self._view = GraphView(model)
        self._integers, self._grows = integers, grows
        self._live: list[Feeds] = [dict(feeds) for feeds in batches]
        self._waiting: dict[str, NodeProto] = {n.name: n for n in self._view.nodes}
        self._replaced: Feeds = {}
        self._passed: Feeds = {}

    def set_constant(self, name: str, value: NDArray[Any]) -> None:
        """Use a new value for a constant from now on."""
        self._replaced[name] = value

    def leave(self, count: int) -> None:
        """Go on with the first ``count`` batches alone."""
        del self._live[count:]

    def join(self, batches: Iterable[Feeds]) -> None:
        """Bring further batches to where the others are; all nodes so far run again for them.

        The values of `put` are not known for them.

        Parameters
        ----------
        batches : iterable of Feeds
            Inputs of the model.
        """
        view, live = self._view, list(self._live[0])
        made = [name for name in live if name in view.producer]
        nodes = upstream(view, made, {n.name for n in view.nodes if n.name not in self._waiting})
        model, inputs = self._piece(nodes, made, view.inputs)
        session = KeptSession(model, integers=self._integers) if nodes else None

        def run(feeds: Feeds) -> Feeds:
            values = {} if session is None else session.run({i: feeds[i] for i in inputs}, made)
            return {name: values[name] if name in values else feeds[name] for name in live}

        self._live.extend(ordered_map(run, batches))

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
        nodes = upstream(self._view, [tensor], self._waiting, {*self._replaced, *self._live[0]})
        if nodes:
            self._run(nodes, tensor)
        values = [feeds[tensor] for feeds in self._live]
        self._forget()
        return values

    def _run(self, nodes: list[NodeProto], wanted: str) -> None:
        made = {o for n in nodes for o in n.output if o}
        for node in nodes:
            del self._waiting[node.name]
        kept = [o for o in made if o == wanted or self._is_awaited(o)]
        model, inputs = self._piece(nodes, kept, self._live[0])
        session = KeptSession(model, integers=self._integers)

        def run(feeds: Feeds) -> Feeds:
            return session.run(feeds, kept)

        parts = ({i: feeds[i] for i in inputs} for feeds in self._live)
        for feeds, values in zip(self._live, ordered_map(run, parts), strict=True):
            feeds.update(values)
            # Drop what is no longer read at once: the tensors of all batches never exist twice.
            for name in [t for t in feeds if t != wanted and not self._is_awaited(t)]:
                del feeds[name]

    def _piece(
        self, nodes: Sequence[NodeProto], outputs: Sequence[str], known: Collection[str]
    ) -> tuple[ModelProto, list[str]]:
        """Return a model of some nodes with the constants that were set, and which known tensors it reads."""
        constants = {**self._passed, **self._replaced}
        made = {o for n in nodes for o in n.output}
        read = dict.fromkeys(i for n in nodes for i in node_reads(n) if i not in made)
        inputs = [i for i in read if i in known and i not in constants]
        types = {i: self._type(i) for i in inputs}
        model = piece(self._view, nodes, types, {o: self._type(o) for o in outputs})
        # As constants, weights get kernels that are several times as fast as with weights that are inputs.
        own = [numpy_helper.from_array(np.asarray(constants[i]), i) for i in read if i in constants]
        names = {tensor.name for tensor in own}
        others = [tensor for tensor in model.graph.initializer if tensor.name not in names]
        del model.graph.initializer[:]
        model.graph.initializer.extend([*others, *own])
        return model, inputs

    def _type(self, name: str) -> int | TypeProto:
        value = self._replaced.get(name, self._live[0].get(name))
        if isinstance(value, np.ndarray) and value.dtype != object:
            return helper.np_dtype_to_tensor_dtype(value.dtype)
        return self._view.kind(name)

    def _forget(self) -> None:
        """Drop the values that no waiting node reads; constants are still needed where others join."""
        for values in self._live:
            for name in [t for t in values if not self._is_awaited(t)]:
                del values[name]
        for name in [t for t in self._replaced if not self._is_awaited(t)]:
            value = self._replaced.pop(name)
            if self._grows:
                self._passed[name] = value

    def _is_awaited(self, tensor: str) -> bool:
        """Return True if a node that has not run reads the tensor."""
        return any(n.name in self._waiting for n in self._view.consumers[tensor])


def upstream(
    view: GraphView, tensors: Iterable[str], among: Collection[str], known: Collection[str] = ()
) -> list[NodeProto]:
    """Return the nodes that compute some tensors from others that are known, in order.

    Parameters
    ----------
    view : GraphView
    tensors : iterable of str
    among : collection of str
        Names of the nodes that may be returned.
    known : collection of str
        Tensors that need no node.
    """
    chosen: set[str] = set()
    queue = list(tensors)
    while queue:
        name = queue.pop()
        node = view.producer.get(name)
        if node is None or name in known or node.name in chosen or node.name not in among:
            continue
        chosen.add(node.name)
        queue.extend(node_reads(node))
    return [n for n in view.nodes if n.name in chosen]


def live_bytes(model: ModelProto, tensors: Iterable[str]) -> Iterator[int]:
    """Yield the bytes of the tensors that a walk holds for one batch on the way to each of some tensors.

    Every element counts 4 bytes; tensors of unknown shape count as 0.

    Parameters
    ----------
    model : ModelProto
        With shapes of one batch.
    tensors : iterable of str
        In the order in which they are reached.
    """
    view = GraphView(model)
    waiting = {n.name for n in view.nodes}
    sizes, live = _sizes(view), set(view.inputs)
    for tensor in tensors:
        before = sum(sizes[t] for t in live)
        nodes = upstream(view, [tensor], waiting, live)
        waiting -= {n.name for n in nodes}
        live |= {o for n in nodes for o in n.output if o}
        live = {t for t in live if t == tensor or any(n.name in waiting for n in view.consumers[t])}
        yield max(before, sum(sizes[t] for t in live))


def _sizes(view: GraphView) -> dict[str, int]:
    """Return the bytes of each tensor, by name."""
    return {
        name: 4 * int(np.prod(view.static_shape(name) or (0,))) for name in (*view.inputs, *view.producer)
    }


def walks_memory(max_memory: int | None) -> int:
    """Return the limit on the bytes of all walks together: a quarter of the memory limit, if that is less."""
    return _MEMORY if max_memory is None else min(_MEMORY, max_memory // 4)


def affordable_batches(model: ModelProto, walks: int, max_memory: int | None) -> int:
    """Return how many batches, at least 1, several concurrent walks can hold in memory; see `walks_memory`.

    Parameters
    ----------
    model : ModelProto
        With shapes of one batch.
    walks : int
        Number of concurrent walks.
    max_memory : int or None
        Memory limit in bytes.
    """
    return max(1, walks_memory(max_memory) // max(1, walks * peak_bytes(model)))


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
    sizes = _sizes(view)
    live = sum(sizes[name] for name in view.inputs)
    peak = live
    for k, node in enumerate(view.nodes):
        live += sum(sizes[o] for o in node.output if o)
        peak = max(peak, live)
        live -= sum(sizes[i] for i in dict.fromkeys(node_reads(node)) if i in sizes and last[i] == k)
        live -= sum(sizes[o] for o in node.output if o and o not in last)
    return peak
