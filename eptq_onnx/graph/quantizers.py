"""Scales, zero points and types of the quantizers in a file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from eptq_onnx.errors import ModelError
from eptq_onnx.graph import edit
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.view import GraphView, attribute, int_attribute
from eptq_onnx.numerics.formats import IntFormat

LIMITS = {
    f"{'int' if signed else 'uint'}{bits}": (own.qmin, own.qmax)
    for bits in (16, 8, 4, 2)
    for signed in (False, True)
    for own in [IntFormat.full(bits, signed=signed)]
}
"""Type to its smallest and largest integer."""


@dataclass(frozen=True)
class Grid:
    """Scale, zero point, type and limits of integers; ``scale`` is None if each run has its own."""

    scale: NDArray[np.float32] | None
    zero: NDArray[np.int64]
    kind: str
    limits: tuple[int, int]

    def same(self, other: Grid) -> bool:
        """Return True if both give integers the same values."""
        if self.scale is None or other.scale is None:
            return self.scale is other.scale
        return np.array_equal(self.scale, other.scale) and np.array_equal(self.zero, other.zero)


class GridReader:
    """Reads the constants of one model.

    Parameters
    ----------
    model : ModelProto
    name : str
        Its name in messages.
    """

    def __init__(self, model: ModelProto, name: str) -> None:
        self._called = name
        self._view, self._builder = GraphView(infer_shapes(model)), edit.Builder(model)
        self._constants = {o for n in self._view.nodes if n.op_type == "Constant" for o in n.output}
        self._constants |= set(self._view.initializers)

    def _scale_constant(self, name: str) -> NDArray[np.float32]:
        own = next((t for t in self._builder.initializers if t.name == name), None)
        return np.asarray(self._value(name) if own is None else numpy_helper.to_array(own), np.float32)

    def _grid(self, node: NodeProto) -> Grid:
        """Return the grid of a QuantizeLinear or DequantizeLinear."""
        inputs = [i for i in node.input[1:] if i]
        if not all(self._is_known(i) for i in inputs):
            raise self._refused(f"its node {node.name or node.output[0]} computes its scale at run time")
        scale, kind = self._scale_constant(inputs[0]), self._type(node)
        zero = np.zeros(scale.shape, np.int64)
        if len(inputs) > 1:
            zero = np.asarray(self._scale_constant(inputs[1])).astype(np.int64)
        return Grid(scale, zero, kind, LIMITS.get(kind, (0, 0)))

    def _is_known(self, name: str) -> bool:
        return name in self._constants or any(t.name == name for t in self._builder.initializers)

    def _type(self, node: NodeProto) -> str:
        """Return the element type of the integers of a QuantizeLinear or DequantizeLinear."""
        number = int_attribute(node, "output_dtype", 0) if node.op_type == "QuantizeLinear" else 0
        place = node.input[2] if len(node.input) > 2 else ""
        if node.op_type == "DequantizeLinear" and node.input[0] in self._constants:
            place = node.input[0]
        if place:
            own = [t for t in self._builder.initializers if t.name == place]
            number = own[0].data_type if own else self._view.elem_type(place)
        return str(TensorProto.DataType.Name(number or TensorProto.UINT8)).lower()

    def _tensor(self, name: str) -> TensorProto:
        if name in self._view.initializers:
            return self._view.initializers[name]
        maker = self._view.producer[name]
        value = attribute(maker, "value") if maker.op_type == "Constant" else None
        if not isinstance(value, TensorProto):
            raise self._refused(f"its constant {name} is computed")
        return value

    def _value(self, name: str) -> NDArray[np.generic]:
        if name in self._view.initializers:
            return self._view.constant(name)
        return numpy_helper.to_array(self._tensor(name))

    def _refused(self, what: str) -> ModelError:
        return ModelError(
            f"{self._called} is quantized in a form that is not read ({what}): give the float model, or the "
            "file in QDQ format."
        )
