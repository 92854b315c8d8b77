"""Elementwise functions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import NodeProto, TensorProto, helper

from eptq_onnx.graph.edit import Builder
from eptq_onnx.graph.lower.base import (
    TINY,
    Lowering,
    NotLowerable,
    constant_input,
    given,
    number,
    shape_of,
    stay,
    stopped,
)
from eptq_onnx.graph.view import GraphView, attribute, int_attribute


def by_slope(slope: Callable[[NodeProto, Builder, str, str], str]) -> Lowering:
    """Return the lowering of an operator y = f(x) whose slope f' is given by other operators.

    y = f(x') + f'(x') (x - x'), where x' equals x, but is a constant to gradients: the value is that of the
    operator itself.

    Parameters
    ----------
    slope : callable
        (node, builder, x', f(x')) to f'(x').
    """

    def rule(node: NodeProto, view: GraphView, b: Builder) -> None:
        own = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        x = stopped(b, "Identity", [node.input[0]])
        value = stopped(b, node.op_type, [x], **own)
        step = b.add("Sub", [node.input[0], x])
        b.add(
            "Add",
            [value, b.add("Mul", [step, stopped(b, "Identity", [slope(node, b, x, value)])])],
            node.output[0],
        )

    return rule


def _square_plus(b: Builder, x: str, factor: float, offset: float) -> str:
    return b.add("Add", [b.add("Mul", [b.add("Mul", [x, x]), factor]), offset])


def _inverse_root(b: Builder, square: str) -> str:
    return b.add("Reciprocal", [b.add("Sqrt", [b.add("Clip", [square, TINY])])])


tan = by_slope(lambda n, b, x, y: _square_plus(b, y, 1.0, 1.0))
sinh = by_slope(lambda n, b, x, y: stopped(b, "Cosh", [x]))
cosh = by_slope(lambda n, b, x, y: stopped(b, "Sinh", [x]))
asin = by_slope(lambda n, b, x, y: _inverse_root(b, _square_plus(b, x, -1.0, 1.0)))
acos = by_slope(lambda n, b, x, y: b.add("Neg", [_inverse_root(b, _square_plus(b, x, -1.0, 1.0))]))
atan = by_slope(lambda n, b, x, y: b.add("Reciprocal", [_square_plus(b, x, 1.0, 1.0)]))
asinh = by_slope(lambda n, b, x, y: _inverse_root(b, _square_plus(b, x, 1.0, 1.0)))
acosh = by_slope(lambda n, b, x, y: _inverse_root(b, _square_plus(b, x, 1.0, -1.0)))
atanh = by_slope(lambda n, b, x, y: b.add("Reciprocal", [_square_plus(b, x, -1.0, 1.0)]))
softplus = by_slope(lambda n, b, x, y: b.add("Sigmoid", [x]))


def _exponential(gamma: float, alpha: float) -> Lowering:
    """Return the lowering of y = gamma x for x > 0, else gamma alpha (exp(rate x) - 1).

    Its slope for x <= 0 is rate (y + gamma alpha).
    """

    def slope(node: NodeProto, b: Builder, x: str, y: str) -> str:
        steep, depth = number(node, "gamma", gamma), number(node, "alpha", alpha)
        below = b.add("Add", [y, steep * depth])
        if node.op_type == "Celu":
            below = b.add("Mul", [below, 1 / depth])
        return b.add("Where", [b.add("Greater", [x, 0.0]), steep, below])

    return by_slope(slope)


elu = celu = _exponential(1.0, 1.0)
selu = _exponential(1.0507009873554805, 1.6732632423543772)


def prelu(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = x * (1 + (slope - 1) * [x < 0]); a Where would take three times as long."""
    x, slope = node.input
    negative = b.add("Cast", [b.add("Less", [x, 0.0])], to=TensorProto.FLOAT)
    b.add(
        "Mul", [x, b.add("Add", [b.add("Mul", [negative, b.add("Sub", [slope, 1.0])]), 1.0])], node.output[0]
    )


def hard_sigmoid(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = clip(alpha * x + beta, 0, 1)."""
    line(b, node.input[0], number(node, "alpha", 0.2), number(node, "beta", 0.5), node.output[0])


def hard_swish(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = x * clip(x / 6 + 1/2, 0, 1)."""
    b.add("Mul", [node.input[0], line(b, node.input[0], 1 / 6, 0.5)], node.output[0])


def line(b: Builder, x: str, alpha: float, beta: float, output: str | None = None) -> str:
    """y = clip(alpha * x + beta, 0, 1)."""
    return b.add("Clip", [b.add("Add", [b.add("Mul", [x, alpha]), beta]), 0.0, 1.0], output)


def thresholded_relu(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = x * [x > alpha]."""
    above = b.add("Greater", [node.input[0], number(node, "alpha", 1.0)])
    b.add("Mul", [node.input[0], b.add("Cast", [above], to=TensorProto.FLOAT)], node.output[0])


def shrink(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = (x + bias) [x < -lambd] + (x - bias) [x > lambd]."""
    x, limit, bias = node.input[0], number(node, "lambd", 0.5), number(node, "bias", 0.0)
    low = b.add("Cast", [b.add("Less", [x, -limit])], to=TensorProto.FLOAT)
    high = b.add("Cast", [b.add("Greater", [x, limit])], to=TensorProto.FLOAT)
    kept = b.add("Mul", [x, b.add("Add", [low, high])])
    b.add("Add", [kept, b.add("Mul", [b.add("Sub", [low, high]), bias])], node.output[0])


def gelu(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = x Phi(x), of x + bias if there is a bias; as `fast_gelu` with ``approximate = tanh``."""
    x = _biased(node, b)
    if attribute(node, "approximate", "none") == "tanh":
        _tanh_gelu(b, x, node.output[0])
        return
    share = b.add("Add", [b.add("Erf", [b.add("Mul", [x, float(np.sqrt(0.5))])]), 1.0])
    b.add("Mul", [b.add("Mul", [x, 0.5]), share], node.output[0])


def fast_gelu(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), of x + bias if there is a bias."""
    _tanh_gelu(b, _biased(node, b), node.output[0])


def _biased(node: NodeProto, b: Builder) -> str:
    return b.add("Add", [node.input[0], node.input[1]]) if given(node, 1) else node.input[0]


def _tanh_gelu(b: Builder, x: str, output: str) -> None:
    root = float(np.sqrt(2 / np.pi))
    inner = b.add("Mul", [x, _square_plus(b, x, 0.044715 * root, root)])
    b.add("Mul", [b.add("Mul", [x, 0.5]), b.add("Add", [b.add("Tanh", [inner]), 1.0])], output)


def swish(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = x sigmoid(alpha x) (Swish, QuickGelu)."""
    alpha = number(node, "alpha", 1.702 if node.domain else 1.0)
    b.add("Mul", [node.input[0], b.add("Sigmoid", [b.add("Mul", [node.input[0], alpha])])], node.output[0])


def modulo(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = a - b q, where the integer quotient q = round((a - mod(a, b)) / b) is a constant to gradients."""
    dividend, divisor = node.input
    rest = stopped(b, "Mod", [dividend, divisor], fmod=int_attribute(node, "fmod", 0))
    quotient = stopped(b, "Round", [b.add("Div", [b.add("Sub", [dividend, rest]), divisor])])
    b.add("Sub", [dividend, b.add("Mul", [divisor, quotient])], node.output[0])


def cast(node: NodeProto, view: GraphView, b: Builder) -> None:
    """Cast from float to float → Identity; all other casts are constants to gradients."""
    if view.is_float(node.input[0]) and view.is_float(node.output[0]):
        b.add("Identity", [node.input[0]], node.output[0])
    else:
        stay(node, b)


def dropout(node: NodeProto, view: GraphView, b: Builder) -> None:
    """y = x outside of training mode; the mask is true everywhere."""
    training = constant_input(node, view, 2, "mode")
    if training is not None and training.any():
        raise NotLowerable("it drops values at random")
    b.add("Identity", [node.input[0]], node.output[0])
    if any(node.output[1:]):
        b.add("Identity", [np.ones(shape_of(view, node.input[0]), np.bool_)], node.output[1])
