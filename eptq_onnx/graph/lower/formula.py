"""Lowerings given as formulas in the rows of the operator table."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper, parser

from eptq_onnx.graph.edit import Builder
from eptq_onnx.graph.lower.base import Lowering, NotLowerable, given, unused
from eptq_onnx.graph.view import GraphView


def formula(text: str) -> Lowering:
    """Return the lowering of an operator that is a composition of others, in the notation of ONNX functions.

    Parameters
    ----------
    text : str
        ``Name <attributes> (inputs) => (outputs) { nodes }``. An attribute without a default is written as
        ``alpha``; one with a default, listed after the others, as ``alpha: float = 1.0``. A Constant gives
        access to its value: ``a = Constant <value_float: float = @alpha> ()``.

    Raises
    ------
    ValueError
        If the text cannot be parsed.
    """
    try:
        body = parser.parse_function(f'<domain: "formula", opset_import: ["" : 17]> {text}')
    except parser.ParseError as e:
        raise ValueError(f"{text}: {e}") from e
    defaults = {a.name: helper.get_attribute_value(a) for a in body.attribute_proto}
    known = {*body.attribute, *defaults}

    def rule(node: NodeProto, view: GraphView, b: Builder) -> None:
        unused(node, len(body.output))
        unknown = next((a.name for a in node.attribute if a.name not in known), None)
        if unknown is not None:
            raise NotLowerable(f"its formula does not know the attribute {unknown}")
        values = defaults | {a.name: helper.get_attribute_value(a) for a in node.attribute}
        names = {formal: given(node, k) for k, formal in enumerate(body.input)}
        absent = next((formal for formal, name in names.items() if not name), None)
        if absent is not None:
            raise NotLowerable(f"its input {absent} is absent")
        results = dict(zip(body.output, node.output, strict=False))
        for step in body.node:
            own = {
                a.name: _value(values, a.ref_attr_name) if a.ref_attr_name else helper.get_attribute_value(a)
                for a in step.attribute
            }
            if step.op_type == "Constant":
                [value] = own.values()
                names[step.output[0]] = b.constant(_array(value))
            else:
                names[step.output[0]] = b.add(
                    step.op_type, [names[i] for i in step.input], results.get(step.output[0]), **own
                )

    return rule


def _value(values: dict[str, Any], name: str) -> Any:
    if name not in values:
        raise NotLowerable(f"its attribute {name} is absent")
    return values[name]


def _array(value: Any) -> NDArray[Any]:
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    found = np.asarray(value)
    return found.astype(np.float32) if found.dtype.kind == "f" else found
