"""What the rules have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from eptq_onnx.graph.edit import Builder
from eptq_onnx.graph.view import STOP, GraphView, attribute

Lowering: TypeAlias = Callable[[NodeProto, GraphView, Builder], None]
Operand: TypeAlias = str | float | NDArray[Any]

TINY = 1e-30
"""Smallest argument of roots and logarithms whose slope at 0 is infinite: 0 times that is not a number."""


class NotLowerable(Exception):
    """This node cannot be rewritten; the message says why."""


def shape_of(view: GraphView, name: str) -> tuple[int, ...]:
    """Static shape of a tensor."""
    shape = view.static_shape(name)
    if shape is None:
        raise NotLowerable(f"the shape of {name} is not static")
    return shape


def rank_of(view: GraphView, name: str) -> int:
    """Rank of a tensor."""
    shape = view.shape(name)
    if shape is None:
        raise NotLowerable(f"the rank of {name} is unknown")
    return len(shape)


def number(node: NodeProto, name: str, default: float) -> float:
    """Float attribute."""
    return float(attribute(node, name, default))  # type: ignore[arg-type]


def given(node: NodeProto, position: int) -> str:
    """Name of an optional input, empty if absent."""
    return node.input[position] if len(node.input) > position else ""


def constant_input(node: NodeProto, view: GraphView, position: int, what: str) -> NDArray[Any] | None:
    """Value of an optional input that must be known, or None if it is absent."""
    name = given(node, position)
    if not name:
        return None
    if not view.is_constant(name):
        raise NotLowerable(f"its {what} are computed at run time")
    return view.constant(name)


def ints(values: Sequence[int]) -> NDArray[np.int64]:
    """A one-dimensional int64 constant: axes, sizes."""
    return np.array(values, np.int64)


def stopped(b: Builder, op_type: str, inputs: Sequence[Operand], **options: Any) -> str:
    """A node whose result is a constant to gradients."""
    return b.add(op_type, inputs, doc_string=STOP, **options)


def stay(node: NodeProto, b: Builder) -> None:
    """Leave the node as it is, as a constant to gradients."""
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.doc_string = STOP
    b.nodes.append(copy)


def reshape(b: Builder, x: str, shape: Sequence[int], output: str | None = None) -> str:
    """Reshape to a constant shape."""
    return b.add("Reshape", [x, ints(shape)], output)


def transpose(b: Builder, x: str, order: Sequence[int], output: str | None = None) -> str:
    """Transpose, left out where nothing moves and the result needs no name."""
    if list(order) == list(range(len(order))):
        return x if output is None else b.add("Identity", [x], output)
    return b.add("Transpose", [x], output, perm=list(order))


def total(b: Builder, terms: Sequence[str], output: str | None = None, op_type: str = "Add") -> str:
    """The terms, joined pairwise."""
    if len(terms) == 1:
        return b.add("Identity", terms, output)
    result = terms[0]
    for term in terms[1:-1]:
        result = b.add(op_type, [result, term])
    return b.add(op_type, [result, terms[-1]], output)


def unused(node: NodeProto, first: int = 1) -> None:
    """Refuse a node of which more than the first outputs are wanted."""
    if any(node.output[first:]):
        raise NotLowerable(f"its output {next(o for o in node.output[first:] if o)} is used")
