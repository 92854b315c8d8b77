"""Analysis of the channel axis of each tensor, for scores, equalization, rotation, attention and the loop.

Some operators define it: a convolution reads and produces channels along axis 1, a matrix product along the
last axis. Others keep the axis from input to output, or move it (Transpose, Reshape). If the producers of a
tensor do not determine its channel axis, the consumers do: an image that is transposed in front of a
convolution has its channels last. If neither do, the default is axis 1 from rank 4 on (images and volumes,
attention heads), and the last axis below (tokens, features).

A *rule* propagates an axis through a node, from one of its tensors to another, in either direction. It
returns None if the axis ends there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from onnx import NodeProto

from eptq_onnx.graph.view import GraphView, Shape, int_attribute, ints_attribute

Rule = Callable[[NodeProto, GraphView, str, str, int], int | None]
"""(node, view, source, target, axis of the source) to the axis of the target; both have a known rank."""


class AxisSpec(NamedTuple):
    """What the operator table states about a node.

    Parameters
    ----------
    data : sequence of str
        Inputs that carry activations.
    makes, reads : int or None
        Channel axis of the outputs, unless one is propagated to them; and channel axis of ``data``.
    rule : Rule or None
    """

    data: Sequence[str]
    makes: int | None
    reads: int | None
    rule: Rule | None


def channel_axes(view: GraphView, axis_spec: Callable[[NodeProto], AxisSpec]) -> dict[str, int]:
    """Return the channel axis, counted from the front, of every computed tensor and input that has axes.

    Parameters
    ----------
    view : GraphView
    axis_spec : callable
        Node to what the operator table states about it.
    """
    table = [(node, axis_spec(node)) for node in view.nodes]
    known: dict[str, int] = {}
    count = -1
    while count < len(known):
        count = len(known)
        for node, spec in table:
            _forward(node, spec, view, known)
        for node, spec in reversed(table):
            _backward(node, spec, view, known)
    for name in view.inputs:
        _settle(name, view, known)
    for node, spec in table:
        # A tensor gets the default before anything computed from it does.
        _forward(node, spec, view, known)
        for name in filter(None, node.output):
            _settle(name, view, known)
    return known


def _settle(name: str, view: GraphView, known: dict[str, int]) -> None:
    rank = _rank(view, name)
    if rank:
        known.setdefault(name, 1 if rank >= 4 else rank - 1)


def _forward(node: NodeProto, spec: AxisSpec, view: GraphView, known: dict[str, int]) -> None:
    """Determine the axes of a node's outputs from its inputs or operator."""
    for name in filter(None, node.output):
        rank = _rank(view, name)
        if name in known or not rank:
            continue
        axis = next(_carried(node, spec, view, known, name), None)
        if axis is None and spec.makes is not None and -rank <= spec.makes < rank:
            axis = spec.makes % rank
        if axis is not None:
            known[name] = axis


def _carried(
    node: NodeProto, spec: AxisSpec, view: GraphView, known: Mapping[str, int], output: str
) -> Iterator[int]:
    """Yield the axes that a rule propagates to an output, first from operands not broadcast along theirs."""
    if spec.rule is None:
        return
    operands = [i for i in spec.data if i in known]
    for operand in sorted(operands, key=lambda i: (view.shape(i) or ())[known[i]] == 1):
        axis = spec.rule(node, view, operand, output, known[operand])
        if axis is not None:
            yield axis


def _backward(node: NodeProto, spec: AxisSpec, view: GraphView, known: dict[str, int]) -> None:
    """Determine the axes of a node's inputs from its operator or outputs."""
    for name in spec.data:
        rank = _rank(view, name)
        if name in known or not rank or view.is_constant(name):
            continue
        if spec.reads is not None and -rank <= spec.reads < rank:
            known[name] = spec.reads % rank
        elif spec.rule is not None:
            outputs = [o for o in node.output if o in known]
            found = (spec.rule(node, view, o, name, known[o]) for o in outputs)
            axis = next((a for a in found if a is not None), None)
            if axis is not None:
                known[name] = axis


def _rank(view: GraphView, name: str) -> int:
    return len(view.shape(name) or ())


# ---- rules -------------------------------------------------------------------------------------------------
def keeps(node: NodeProto, view: GraphView, source: str, target: str, axis: int) -> int | None:
    """Keep the axis; tensors are aligned at their last axes (broadcasting)."""
    place = axis + _rank(view, target) - _rank(view, source)
    return place if 0 <= place < _rank(view, target) else None


def transposed(node: NodeProto, view: GraphView, source: str, target: str, axis: int) -> int | None:
    """Move the axis by the permutation of a Transpose."""
    order = ints_attribute(node, "perm") or list(reversed(range(_rank(view, source))))
    if axis not in order:
        return None
    return order.index(axis) if target in node.output else order[axis]


def stacked(node: NodeProto, view: GraphView, source: str, target: str, axis: int) -> int | None:
    """Keep a batch axis of a product of computed matrices (attention heads)."""
    both = all(_rank(view, i) > 2 and not view.is_constant(i) for i in node.input[:2])
    return keeps(node, view, source, target, axis) if both and axis < _rank(view, source) - 2 else None


def gathered(node: NodeProto, view: GraphView, source: str, target: str, axis: int) -> int | None:
    """Account for Gather, which replaces one axis by the axes of its indices."""
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
    """Account for the axes that a reduction removes."""
    rank, left = (_rank(view, name) for name in (node.input[0], node.output[0]))
    if rank == left:
        return axis
    axes = _axes(node, view)
    gone = {a % rank for a in axes} if axes else None
    return None if gone is None else _without(axis, gone, rank, forward=target in node.output)


def squeezed(node: NodeProto, view: GraphView, source: str, target: str, axis: int) -> int | None:
    """Account for axes of size 1 that Squeeze removes or Unsqueeze adds."""
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
    """Follow the axis through Reshape and Flatten.

    Of an axis that is split, the first part is the channel axis; an axis that is merged with others becomes
    the merged axis. An axis that is merged with the batch ends there.
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
    """Return the axis after a reshape along which the first step along ``axis`` moves, or None."""
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
    """Return the axes of a reduction, Squeeze or Unsqueeze (attribute or input); empty if unknown."""
    if len(node.input) > 1 and node.input[1]:
        return (
            [int(a) for a in view.constant(node.input[1]).reshape(-1)]
            if view.is_constant(node.input[1])
            else []
        )
    return ints_attribute(node, "axes")


def _without(axis: int, gone: set[int], rank: int, *, forward: bool) -> int | None:
    """Map an axis of a tensor of ``rank`` to its position once the axes ``gone`` are removed; or back."""
    kept = [k for k in range(rank) if k not in gone]
    if forward:
        return kept.index(axis) if axis in kept else None
    return kept[axis] if axis < len(kept) else None
