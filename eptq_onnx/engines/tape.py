"""The tape of a gradient rule: queries on the forward graph, and collection of backward nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from eptq_onnx.errors import GradientError
from eptq_onnx.graph.edit import Builder
from eptq_onnx.graph.view import GraphView, Shape

Operand: TypeAlias = str | float
"""A tensor's name, or a number."""

FLOAT_OR_UNKNOWN = (TensorProto.FLOAT, TensorProto.UNDEFINED)


class Tape:
    """Adds nodes to a forward graph; identical nodes are added once.

    Parameters
    ----------
    view : GraphView
        The forward graph, with shapes.
    builder : Builder
        Collects the nodes.
    """

    def __init__(self, view: GraphView, builder: Builder) -> None:
        self.view, self.builder = view, builder
        self._made: dict[tuple[object, ...], str] = {}

    def add(self, op_type: str, *inputs: Operand, **attributes: Any) -> str:
        """Add a node, unless there is an identical one, and return its output."""
        names = [self.builder.constant(x) if isinstance(x, float) else x for x in inputs]
        key = (op_type, *names, repr(sorted(attributes.items())))
        if key not in self._made:
            self._made[key] = self.builder.add(op_type, names, **attributes)
        return self._made[key]

    def ints(self, values: Sequence[int]) -> str:
        """Add an int64 constant."""
        return self.builder.constant(np.array(values, np.int64), "ints")

    def dims(self, name: str) -> Shape:
        """Return the shape of a tensor, with None for dimensions that are only known at run time.

        Raises
        ------
        GradientError
            If the rank is unknown.
        """
        shape = self.view.shape(name)
        if shape is None:
            raise GradientError(
                f"the standard engine cannot differentiate the model: the rank of {name} is unknown."
            )
        return shape

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Raises
        ------
        GradientError
            If it is unknown.
        """
        shape = self.view.static_shape(name)
        if shape is None:
            raise GradientError(
                f"the standard engine cannot differentiate the model: the shape of {name} is unknown."
            )
        return shape

    def size(self, name: str) -> str:
        """Add the shape of a tensor as a tensor: a constant if known, else computed."""
        shape = self.view.static_shape(name)
        return self.add("Shape", name) if shape is None else self.ints(shape)

    def constant(self, node: NodeProto, position: int) -> NDArray[Any] | None:
        """Return the value of an optional constant input, or None if it is absent.

        Raises
        ------
        GradientError
            If the input is computed at run time.
        """
        name = node.input[position] if len(node.input) > position else ""
        if name and not self.view.is_constant(name):
            raise refusal(node, f"its input {name} is computed at run time")
        return self.view.constant(name) if name else None

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """Add a Reshape of x."""
        return self.add("Reshape", x, self.ints(shape))

    def sum(self, x: str, axes: Sequence[int], *, keepdims: bool = False) -> str:
        """Add a sum over axes."""
        return self.builder.reduce("ReduceSum", x, axes, keepdims=keepdims)

    def sum_to(self, x: str, shape: Shape, name: str, wanted: Shape) -> str:
        """Sum x, of shape ``shape``, to the shape ``wanted`` of ``name``: the adjoint of broadcasting."""
        first = len(shape) - len(wanted)
        if None in shape or None in wanted:
            ones = (
                self.add("Concat", self.ints([1] * first), self.size(name), axis=0)
                if first
                else self.size(name)
            )
            repeated = self.add("NonZero", self.add("Not", self.add("Equal", ones, self.add("Shape", x))))
            summed = self.add(
                "ReduceSum", x, self.reshape(repeated, [-1]), keepdims=1, noop_with_empty_axes=1
            )
            return self.add("Reshape", summed, self.size(name))
        axes = [*range(first), *(first + i for i, n in enumerate(wanted) if n != shape[first + i])]
        if not axes:
            return x
        summed = self.sum(x, axes, keepdims=True)
        return self.add("Reshape", summed, self.size(name)) if first else summed

    def unsqueeze(self, x: str, axes: Sequence[int]) -> str:
        """Add axes of length 1 to x."""
        return (
            self.add("Unsqueeze", x, self.ints(axes))
            if self.builder.opset >= 13
            else self.add("Unsqueeze", x, axes=list(axes))
        )

    def kept(self, x: str, condition: str) -> str:
        """Return x where the condition holds, else 0."""
        # Where takes three times as long as the product.
        return self.add("Mul", x, self.add("Cast", condition, to=TensorProto.FLOAT))


def refusal(node: NodeProto, reason: str) -> GradientError:
    """Return the error for a node that cannot be differentiated in its present form."""
    return GradientError(
        f"the standard engine cannot differentiate the {node.op_type} {node.name}: {reason}."
    )
