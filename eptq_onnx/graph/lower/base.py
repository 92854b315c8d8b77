"""Helpers shared by all lowering rules."""

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
"""Smallest argument of functions with infinite slope at 0, such as roots: 0 times infinity is NaN."""


class NotLowerable(Exception):
    """Raised if a node cannot be lowered; the message is the reason."""


def shape_of(view: GraphView, name: str) -> tuple[int, ...]:
    """Return the static shape of a tensor, or raise `NotLowerable`."""
    shape = view.static_shape(name)
    if shape is None:
        raise NotLowerable(f"the shape of {name} is not static")
    return shape


def rank_of(view: GraphView, name: str) -> int:
    """Return the rank of a tensor, or raise `NotLowerable`."""
    shape = view.shape(name)
    if shape is None:
        raise NotLowerable(f"the rank of {name} is unknown")
    return len(shape)


def number(node: NodeProto, name: str, default: float) -> float:
    """Return a float attribute of a node."""
    return float(attribute(node, name, default))  # type: ignore[arg-type]


def given(node: NodeProto, position: int) -> str:
    """Return the name of an optional input, empty if absent."""
    return node.input[position] if len(node.input) > position else ""


def constant_input(node: NodeProto, view: GraphView, position: int, what: str) -> NDArray[Any] | None:
    """Return the value of an optional input, None if absent; raise `NotLowerable` if it is not constant."""
    name = given(node, position)
    if not name:
        return None
    if not view.is_constant(name):
        raise NotLowerable(f"its {what} are computed at run time")
    return view.constant(name)


def ints(values: Sequence[int]) -> NDArray[np.int64]:
    """Return a one-dimensional int64 array: axes, sizes, indices."""
    return np.array(values, np.int64)


def stopped(b: Builder, op_type: str, inputs: Sequence[Operand], **options: Any) -> str:
    """Add a node whose result gradients treat as a constant."""
    return b.add(op_type, inputs, doc_string=STOP, **options)


def stay(node: NodeProto, b: Builder) -> None:
    """Keep a node as it is, with results that gradients treat as constants."""
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.doc_string = STOP
    b.nodes.append(copy)


def reshape(b: Builder, x: str, shape: Sequence[int], output: str | None = None) -> str:
    """Add a Reshape to a constant shape."""
    return b.add("Reshape", [x, ints(shape)], output)


def transpose(b: Builder, x: str, order: Sequence[int], output: str | None = None) -> str:
    """Add a Transpose, unless the order is unchanged and the result needs no name."""
    if list(order) == list(range(len(order))):
        return x if output is None else b.add("Identity", [x], output)
    return b.add("Transpose", [x], output, perm=list(order))


def total(b: Builder, terms: Sequence[str], output: str | None = None, op_type: str = "Add") -> str:
    """Combine all terms by a binary operator, by default their sum."""
    if len(terms) == 1:
        return b.add("Identity", terms, output)
    result = terms[0]
    for term in terms[1:-1]:
        result = b.add(op_type, [result, term])
    return b.add(op_type, [result, terms[-1]], output)


def unused(node: NodeProto, first: int = 1) -> None:
    """Raise `NotLowerable` if an output from position ``first`` on is used."""
    if any(node.output[first:]):
        raise NotLowerable(f"its output {next(o for o in node.output[first:] if o)} is used")
