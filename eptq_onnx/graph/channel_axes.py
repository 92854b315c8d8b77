"""Along which axis of each tensor its channels lie: decided here, for scores, equalization, rotation,
attention and the loop.

The operators say it: a convolution makes and reads channels along axis 1, a matrix product along the last
axis. Others carry the axis from what they read to what they make, or move it (Transpose, Reshape). What no
producer tells, readers do: an image that is transposed in front of a convolution has its channels last. Where
neither tells, axis 1 is taken from rank 4 on (images and volumes, attention heads), and the last axis below
(tokens, features).

A *rule* follows an axis through a node, from one of its tensors to another, in either direction; None where
it ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from onnx import NodeProto

from eptq_onnx.graph.view import GraphView, Shape, int_attribute, ints_attribute

Rule = Callable[[NodeProto, GraphView, str, str, int], int | None]
"""Of node, view, tensor, other tensor, and the axis in the first: the axis in the other. Both tensors have a
known rank."""


class Said(NamedTuple):
    """What the operator table says of a node.

    Parameters
    ----------
    data : sequence of str
        Inputs that carry activations.
    makes, reads : int or None
        Axis of the channels of its outputs, if none is carried there; and of those of ``data``.
    rule : Rule or None
    """

    data: Sequence[str]
    makes: int | None
    reads: int | None
    rule: Rule | None


def channel_axes(view: GraphView, said_of: Callable[[NodeProto], Said]) -> dict[str, int]:
    """The channel axis of every computed tensor and input that has axes, counted from the front.

    Parameters
    ----------
    view : GraphView
    said_of : callable
        Node to what is said of its operator.
    """
    table = [(node, said_of(node)) for node in view.nodes]
    known: dict[str, int] = {}
    count = -1
    while count < len(known):
        count = len(known)
        for node, said in table:
            _forward(node, said, view, known)
        for node, said in reversed(table):
            _backward(node, said, view, known)
    for name in view.inputs:
        _settle(name, view, known)
    for node, said in table:
        # A tensor that nothing tells about is decided before what is made of it.
        _forward(node, said, view, known)
        for name in filter(None, node.output):
            _settle(name, view, known)
    return known


def _settle(name: str, view: GraphView, known: dict[str, int]) -> None:
    rank = _rank(view, name)
    if rank:
        known.setdefault(name, 1 if rank >= 4 else rank - 1)


def _forward(node: NodeProto, said: Said, view: GraphView, known: dict[str, int]) -> None:
    """What a node makes, from what it reads."""
    for name in filter(None, node.output):
        rank = _rank(view, name)
        if name in known or not rank:
            continue
        axis = next(_carried(node, said, view, known, name), None)
        if axis is None and said.makes is not None and -rank <= said.makes < rank:
            axis = said.makes % rank
        if axis is not None:
            known[name] = axis


def _carried(
    node: NodeProto, said: Said, view: GraphView, known: Mapping[str, int], output: str
) -> Iterator[int]:
    """The axes that a rule carries to an output; first those of operands that are not broadcast along it."""
    if said.rule is None:
        return
    operands = [i for i in said.data if i in known]
    for operand in sorted(operands, key=lambda i: (view.shape(i) or ())[known[i]] == 1):
        axis = said.rule(node, view, operand, output, known[operand])
        if axis is not None:
            yield axis


def _backward(node: NodeProto, said: Said, view: GraphView, known: dict[str, int]) -> None:
    """What a node reads, from its operator or from what it makes."""
    for name in said.data:
        rank = _rank(view, name)
        if name in known or not rank or view.is_constant(name):
            continue
        if said.reads is not None and -rank <= said.reads < rank:
            known[name] = said.reads % rank
        elif said.rule is not None:
            outputs = [o for o in node.output if o in known]
            found = (said.rule(node, view, o, name, known[o]) for o in outputs)
            axis = next((a for a in found if a is not None), None)
            if axis is not None:
                known[name] = axis


def _rank(view: GraphView, name: str) -> int:
    return len(view.shape(name) or ())


# ---- rules -------------------------------------------------------------------------------------------------
def keeps(node: NodeProto, view: GraphView, source: str, target: str, axis: int) -> int | None:
    """The axis stays; tensors of fewer axes meet the last axes of others (broadcasting)."""
    place = axis + _rank(view, target) - _rank(view, source)
    return place if 0 <= place < _rank(view, target) else None


def transposed(node: NodeProto, view: GraphView, source: str, target: str, axis: int) -> int | None:
    """Transpose moves it."""
    order = ints_attribute(node, "perm") or list(reversed(range(_rank(view, source))))
    if axis not in order:
        return None
    return order.index(axis) if target in node.output else order[axis]


def stacked(node: NodeProto, view: GraphView, source: str, target: str, axis: int) -> int | None:
    """A product of computed matrices keeps an axis over which it is repeated (attention heads)."""
    both = all(_rank(view, i) > 2 and not view.is_constant(i) for i in node.input[:2])
    return keeps(node, view, source, target, axis) if both and axis < _rank(view, source) - 2 else None


def gathered(node: NodeProto, view: GraphView, source: str, target: str, axis: int) -> int | None:
    """Gather puts the axes of its indices in place of one axis."""
    x, indices = node.input[:2]
    if indices in (source, target):
        return None
    place = int_attribute(node, "axis", 0) % max(_rank(view, x), 1)
    more = len(view.shape(indices) or ()) - 1
    if axis == place or (source != x and place < axis <= place + more):
        return place if more >= 0 else None
    shift = more if source == x else -more
    return axis + shift * (axis > place)


def reduced(node: NodeProto, view: GraphView, source: str, target: str, axis: int) -> int | None:
    """A reduction drops axes, unless they are kept as one place."""
    rank, left = (_rank(view, name) for name in (node.input[0], node.output[0]))
    if rank == left:
        return axis
    axes = _axes(node, view)
    gone = {a % rank for a in axes} if axes else None
    return None if gone is None else _without(axis, gone, rank, forward=target in node.output)


def squeezed(node: NodeProto, view: GraphView, source: str, target: str, axis: int) -> int | None:
    """Squeeze drops axes of one place, Unsqueeze adds some."""
    longer, shorter = (node.input[0], node.output[0])[:: 1 if node.op_type == "Squeeze" else -1]
    rank, shape = _rank(view, longer), view.shape(longer) or ()
    axes = _axes(node, view) or [k for k, d in enumerate(shape) if d == 1 and rank > _rank(view, shorter)]
    gone = {a % rank for a in axes}
    return (
        _without(axis, gone, rank, forward=source == longer)
        if rank - len(gone) == _rank(view, shorter)
        else None
    )


def reshaped(node: NodeProto, view: GraphView, source: str, target: str, axis: int) -> int | None:
    """Reshape and Flatten: where the axis is cut, its first part; where it is joined with others, what they
    become.

    An axis that is joined with the batch ends there.
    """
    before, after = view.shape(source) or (), view.shape(target) or ()
    ends = min(len(before), len(after))
    front = next((k for k in range(ends) if before[k] != after[k]), ends)
    back = next((k for k in range(ends - front) if before[-1 - k] != after[-1 - k]), ends - front)
    if axis < front:
        return axis
    if axis >= len(before) - back:
        return axis + len(after) - len(before)
    inner, outer = before[front : len(before) - back], after[front : len(after) - back]
    place = _met(inner, outer, axis - front)
    joined = place is not None and front + place == 0 and axis > 0
    return None if place is None or joined else front + place


def _met(before: Shape, after: Shape, axis: int) -> int | None:
    """Which of the axes behind a reshape holds the first step along one in front of it."""
    if len(after) == 1:
        return 0
    extents = (before[:axis], after)
    if any(d is None for d in extents[0]):
        return None
    start = math.prod(d or 0 for d in extents[0])
    reached = 1
    for k, extent in enumerate(after):
        if extent is None:
            return k if reached == start else None
        if reached <= start < reached * extent:
            return k
        reached *= extent
    return None


def _axes(node: NodeProto, view: GraphView) -> list[int]:
    """The axes of a reduction, Squeeze or Unsqueeze: an attribute, or a constant input; none if they are not
    known."""
    if len(node.input) > 1 and node.input[1]:
        return (
            [int(a) for a in view.constant(node.input[1]).reshape(-1)]
            if view.is_constant(node.input[1])
            else []
        )
    return ints_attribute(node, "axes")


def _without(axis: int, gone: set[int], rank: int, *, forward: bool) -> int | None:
    """An axis where others are left out of so many; or, backward, what it was before."""
    kept = [k for k in range(rank) if k not in gone]
    if forward:
        return kept.index(axis) if axis in kept else None
    return kept[axis] if axis < len(kept) else None
