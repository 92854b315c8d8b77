"""Execution of models too large for one run, as blocks of consecutive nodes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto, helper

from eptq_onnx.graph import edit
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.parallel import paired_map
from eptq_onnx.proto import store
from eptq_onnx.proto.bodies import node_reads
from eptq_onnx.runtime import ExactSession

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """Consecutive nodes of a model.

    Parameters
    ----------
    model : ModelProto
        The nodes as a model. Its inputs are those of the whole model that it reads, and ``reads``; its
        outputs are those of the whole model that it produces, and ``makes``.
    reads : tuple of str
        Tensors read from earlier blocks.
    makes : tuple of str
        Tensors that later blocks read.
    """

    model: ModelProto
    reads: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()


def blocks_of(model: ModelProto, batches: Sequence[Feeds], most: int | None) -> list[Block]:
    """Split a model into blocks of at most ``most`` bytes; None keeps it in one block.

    Sizes follow from the shapes of the batches; see `eptq_onnx.graph.shapes.specialize`.
    """
    return [Block(model)] if most is None else cut(model, specialize(model, batches), most)


def cut(model: ModelProto, shaped: ModelProto, most: int) -> list[Block]:
    """Split a model into blocks whose tensors and weights take at most ``most`` bytes.

    A single node that takes more is a block of its own; a model that takes less is one block, itself.

    Parameters
    ----------
    model : ModelProto
    shaped : ModelProto
        The same nodes, with the shapes of one batch; tensors of unknown shape count as 0 bytes.
    most : int
        In bytes.
    """
    view = GraphView(model)
    ends = _ends(GraphView(shaped), most)
    if not ends:
        return [Block(model)]
    bounds = [0, *ends, len(view.nodes)]
    place = {
        o: k for k, (a, b) in enumerate(itertools.pairwise(bounds)) for n in view.nodes[a:b] for o in n.output
    }
    readers = {
        name: {place[o] for n in nodes for o in n.output if o} for name, nodes in view.consumers.items()
    }
    return [_block(view, place, readers, k, a, b) for k, (a, b) in enumerate(itertools.pairwise(bounds))]


def _ends(view: GraphView, most: int) -> list[int]:
    """Return the positions of the nodes that begin a new block, except the first."""
    last = {name: k for k, node in enumerate(view.nodes) for name in node_reads(node)}
    ends: list[int] = []
    size, seen = 0, set[str]()
    open_until: dict[str, int] = {}
    for k, node in enumerate(view.nodes):
        fresh = [i for i in node_reads(node) if i in view.initializers and i not in seen]
        own = sum(store.value_bytes(view.initializers[i]) for i in fresh) + sum(
            bytes_of(view, o) for o in node.output
        )
        open_until = {name: end for name, end in open_until.items() if end >= k}
        # Values that cross into another block are fed and fetched, so they must be tensors of known type.
        if size and size + own > most and all(view.elem_type(name) for name in open_until):
            ends.append(k)
            size, seen = 0, set()
        size += own
        seen.update(fresh)
        open_until |= {o: last[o] for o in node.output if o in last}
    return ends


def tensor_bytes(model: ModelProto) -> int:
    """Return the bytes of all tensors that a model computes; tensors of unknown shape count as 0.

    The model has the shapes of one batch.
    """
    view = GraphView(model)
    return sum(bytes_of(view, name) for name in view.producer)


def bytes_of(view: GraphView, name: str) -> int:
    """Return the size of a tensor in bytes, or 0 if its type or shape is unknown."""
    shape = view.static_shape(name)
    if shape is None or not view.elem_type(name):
        return 0
    return int(helper.tensor_dtype_to_np_dtype(view.elem_type(name)).itemsize * math.prod(shape))


def _block(
    view: GraphView, place: dict[str, int], readers: dict[str, set[int]], k: int, begin: int, end: int
) -> Block:
    nodes = view.nodes[begin:end]
    read = dict.fromkeys(i for n in nodes for i in node_reads(n) if place.get(i) != k)
    made = [o for n in nodes for o in n.output if o]
    reads = tuple(i for i in read if i in place)
    makes = tuple(o for o in made if any(p > k for p in readers.get(o, ())))
    inputs = [i for i in view.model.graph.input if i.name in read and i.name in view.inputs]
    known = {v.name: v for v in (*view.model.graph.value_info, *view.model.graph.output)}
    graph = helper.make_graph(
        nodes,
        f"{view.model.graph.name}/{k}",
        [*inputs, *(_described(view, known, i) for i in reads)],
        [
            _described(view, known, o)
            for o in dict.fromkeys([*(o for o in view.outputs if place.get(o) == k), *makes])
        ],
        [view.initializers[i] for i in read if i in view.initializers],
        value_info=[known[o] for o in made if o in known],
    )
    model = helper.make_model(graph, opset_imports=view.model.opset_import, ir_version=view.model.ir_version)
    return Block(model, reads, makes)


def _described(view: GraphView, known: dict[str, ValueInfoProto], name: str) -> ValueInfoProto:
    return known[name] if name in known else edit.described(name, view.kind(name))


def observe(
    blocks: Sequence[Block], batches: Iterable[Feeds], wanted: Sequence[str]
) -> Iterator[tuple[int, Feeds]]:
    """Run a model block by block and yield the wanted tensors of every batch.

    Parameters
    ----------
    blocks : sequence of Block
    batches : iterable of Feeds
        A single block draws them one at a time. Several blocks keep them all in memory, together with the
        tensors that later blocks read.
    wanted : sequence of str
        Computed tensors, or inputs of the model, which come with the first block.

    Yields
    ------
    tuple of (int, Feeds)
        Index of a batch, and those of its wanted tensors that the current block produces.
    """
    return reduced(blocks, batches, wanted, lambda number, name, value: value)


def reduced(
    blocks: Sequence[Block],
    batches: Iterable[Feeds],
    wanted: Sequence[str],
    reduce: Callable[[int, str, NDArray[Any]], T],
) -> Iterator[tuple[int, dict[str, T]]]:
    """Yield what a function makes of each tensor that `observe` yields.

    Workers apply it, so that no more whole tensors are in memory than there are workers.

    Parameters
    ----------
    blocks, batches, wanted
        As in `observe`.
    reduce : callable
        Takes the index of a batch, a tensor's name and its value.
    """
    if len(blocks) > 1:
        batches = [dict(feeds) for feeds in batches]
    for k, block in enumerate(blocks):
        made = {o for n in block.model.graph.node for o in n.output}
        given = {i.name for i in block.model.graph.input} if k == 0 else set()
        chosen = [name for name in wanted if name in made or name in given]
        yield from enumerate(_run(block, batches, chosen, reduce))


def advance(block: Block, batches: Iterable[Feeds]) -> None:
    """Run a block and add the tensors that later blocks read to every batch, in place."""
    for _ in _run(block, batches, (), lambda number, name, value: None):
        pass


def _run(
    block: Block,
    batches: Iterable[Feeds],
    chosen: Sequence[str],
    reduce: Callable[[int, str, NDArray[Any]], T],
) -> Iterator[dict[str, T]]:
    """Run a block, and reduce some of the tensors that it computes or is given."""
    inputs = {i.name for i in block.model.graph.input}
    names = list(dict.fromkeys([*(name for name in chosen if name not in inputs), *block.makes]))
    session = ExactSession(edit.exposing(block.model, names)) if names else None
    given = {*(session.inputs if session is not None else ()), *chosen}

    def run(batch: tuple[int, Feeds]) -> tuple[Feeds, dict[str, T]]:
        number, feeds = batch
        values = session.run({n: feeds[n] for n in session.inputs}, names) if session is not None else {}
        found = {n: reduce(number, n, values[n] if n in values else feeds[n]) for n in chosen}
        return {n: values[n] for n in block.makes}, found

    def read(batch: tuple[int, Feeds]) -> tuple[int, Feeds]:
        number, feeds = batch
        return number, {n: value for n, value in feeds.items() if n in given}

    for (_, feeds), (passed, found) in paired_map(run, enumerate(batches), read):
        feeds.update(passed)
        yield found
