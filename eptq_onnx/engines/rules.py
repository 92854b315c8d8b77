"""Gradient rules of the standard engine: for each operator, one rule per input.

A rule gets the tape, the node, the position of the input x and the name of dy = dL/dy. It returns the name of
dx = dL/dx, or None if no gradient passes. There are rules for the operators that all others are lowered to
(`eptq_onnx.graph.lower`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import TypeAlias

import numpy as np
from onnx import NodeProto, TensorProto

from eptq_onnx.engines import moves, windows
from eptq_onnx.engines.tape import FLOAT_OR_UNKNOWN, Operand, Tape, refusal
from eptq_onnx.graph.view import attribute, int_attribute, ints_attribute
from eptq_onnx.ops import LSQ_DOMAIN

Rule: TypeAlias = Callable[[Tape, NodeProto, int, str], str | None]


# ---- elementwise -------------------------------------------------------------------------------------------
def _slope(slope: Callable[[Tape, str, str], Operand]) -> Rule:
    """Return the rule dx = dy * slope(x, y) of an operator with one input."""
    return lambda t, node, k, dy: t.add("Mul", dy, slope(t, node.input[0], node.output[0]))


def _broadcast(rule: Callable[[Tape, NodeProto, int, str], str]) -> Rule:
    """Return a rule that sums the result of another, in the shape of y, over the axes broadcast from x."""

    def summed(t: Tape, node: NodeProto, k: int, dy: str) -> str:
        return t.sum_to(rule(t, node, k, dy), t.dims(node.output[0]), node.input[k], t.dims(node.input[k]))

    return summed


def _nothing(t: Tape, node: NodeProto, k: int, dy: str) -> None:
    return None


def _same(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    return dy


def _negative(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    return t.add("Neg", dy)


def _times_other(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    return t.add("Mul", dy, node.input[1 - k])


def _numerator(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    return t.add("Div", dy, node.input[1])


def _denominator(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """db = -dy y / b."""
    return t.add("Neg", t.add("Div", t.add("Mul", dy, node.output[0]), node.input[1]))


def _base(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = dy p x^(p - 1)."""
    x, p = node.input
    square = t.view.is_constant(p) and bool((t.view.constant(p) == 2).all())
    power = x if square else t.add("Pow", x, t.add("Sub", p, 1.0))
    return t.add("Mul", dy, t.add("Mul", power, p))


def _exponent(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dp = dy y log(x)."""
    return t.add("Mul", dy, t.add("Mul", node.output[0], t.add("Log", node.input[0])))


def _unchanged(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = dy where y = x, else 0: Relu, Clip, Min, Max."""
    return t.kept(dy, t.add("Equal", node.input[k], node.output[0]))


def _chosen(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    return t.kept(dy, node.input[0] if k == 1 else t.add("Not", node.input[0]))


def leaky_relu(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = dy (alpha + (1 - alpha) [x > 0])."""
    return leaky_relu_slope(t, dy, node.input[0], float(attribute(node, "alpha", 0.01)))  # type: ignore[arg-type]


def leaky_relu_slope(t: Tape, dy: str, x: str, alpha: float) -> str:
    """Add the gradient of `leaky_relu`; for alpha >= 0, x may be replaced by y, which has the same sign."""
    rise = t.kept(t.builder.constant(1 - alpha), t.add("Greater", x, 0.0))
    return t.add("Mul", dy, t.add("Add", rise, alpha))


def _cast(t: Tape, node: NodeProto, k: int, dy: str) -> str | None:
    """dx = dy from float to float; no gradient passes integers."""
    return (
        dy
        if all(t.view.elem_type(name) in FLOAT_OR_UNKNOWN for name in (node.input[0], node.output[0]))
        else None
    )


# ---- matrix products ---------------------------------------------------------------------------------------
def _matmul(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dA = dy Bᵀ and dB = Aᵀ dy, summed over the batch axes that were broadcast."""
    a, b = node.input
    rows, columns = t.dims(a), t.dims(b)
    # A vector on the left is a matrix with one row, a vector on the right one with one column.
    if len(rows) == 1:
        a, rows, dy = t.unsqueeze(a, [0]), (1, *rows), t.unsqueeze(dy, [-1 if len(columns) == 1 else -2])
    if len(columns) == 1:
        b, columns, dy = t.unsqueeze(b, [1]), (*columns, 1), t.unsqueeze(dy, [-1])
    if k == 1 and len(columns) == 2:
        # One product over all rows instead of one per matrix of the batch.
        flat = (t.add("Flatten", x, axis=-1) if len(rows) > 2 else x for x in (a, dy))
        return t.add("Reshape", t.add("Gemm", *flat, transA=1), t.size(node.input[1]))
    factors = (dy, _swapped_axes(t, b, len(columns))) if k == 0 else (_swapped_axes(t, a, len(rows)), dy)
    name, wanted = ((a, rows), (b, columns))[k]
    pairs = zip_longest(rows[-3::-1], columns[-3::-1], fillvalue=1)
    batch = [None if m is None or n is None else max(m, n) for m, n in pairs][::-1]
    found = t.sum_to(t.add("MatMul", *factors), (*batch, *wanted[-2:]), name, wanted)
    return found if name == node.input[k] else t.add("Reshape", found, t.size(node.input[k]))


def _swapped_axes(t: Tape, x: str, rank: int) -> str:
    return t.add("Transpose", x, perm=[*range(rank - 2), rank - 1, rank - 2])


def _gemm_left(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dA = alpha dy Bᵀ for y = alpha A B + beta C, transposed if A is."""
    turned, other = int_attribute(node, "transA", 0), int_attribute(node, "transB", 0)
    alpha = float(attribute(node, "alpha", 1.0))  # type: ignore[arg-type]
    if turned:
        return t.add("Gemm", node.input[1], dy, transA=other, transB=1, alpha=alpha)
    return t.add("Gemm", dy, node.input[1], transB=1 - other, alpha=alpha)


def _gemm_right(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dB = alpha Aᵀ dy for y = alpha A B + beta C, transposed if B is."""
    other, turned = int_attribute(node, "transA", 0), int_attribute(node, "transB", 0)
    alpha = float(attribute(node, "alpha", 1.0))  # type: ignore[arg-type]
    if turned:
        return t.add("Gemm", dy, node.input[0], transA=1, transB=other, alpha=alpha)
    return t.add("Gemm", node.input[0], dy, transA=1 - other, alpha=alpha)


def _gemm_offset(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    beta = float(attribute(node, "beta", 1.0))  # type: ignore[arg-type]
    summed = t.sum_to(dy, t.dims(node.output[0]), node.input[2], t.dims(node.input[2]))
    return summed if beta == 1 else t.add("Mul", summed, beta)


# ---- reductions --------------------------------------------------------------------------------------------
def _axes(t: Tape, node: NodeProto) -> list[int]:
    """Return the axes of a reduction, counted from the front.

    They are an attribute, or an input since opset 18 (ReduceSum: 13).
    """
    rank = len(t.dims(node.input[0]))
    told = t.constant(node, 1)
    axes = ints_attribute(node, "axes") if told is None else [int(a) for a in told]
    everything = [] if int_attribute(node, "noop_with_empty_axes", 0) else range(rank)
    return sorted(a % rank for a in axes) if axes else list(everything)


def _like_input(t: Tape, node: NodeProto, *values: str) -> list[str]:
    """Restore the reduced axes of tensors in the shape of the output, so that they broadcast to the input."""
    if int_attribute(node, "keepdims", 1):
        return list(values)
    axes = _axes(t, node)
    return [t.unsqueeze(v, axes) if axes else v for v in values]


def _spread(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    return t.add("Expand", *_like_input(t, node, dy), t.size(node.input[0]))


def _spread_mean(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    sizes = [size for axis, size in enumerate(t.dims(node.input[0])) if axis in _axes(t, node)]
    if None in sizes:
        after, before = (
            t.add("Cast", t.add("Size", x), to=TensorProto.FLOAT) for x in (node.output[0], node.input[0])
        )
        return _spread(t, node, k, t.add("Mul", dy, t.add("Div", after, before)))
    return _spread(t, node, k, t.add("Div", dy, float(np.prod([size or 1 for size in sizes]))))


def _norm(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = dy x / y."""
    return t.add("Mul", node.input[0], *_like_input(t, node, t.add("Div", dy, node.output[0])))


def _squares(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = 2 dy x."""
    return t.add("Mul", node.input[0], *_like_input(t, node, t.add("Add", dy, dy)))


def _log_sum_exp(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = dy exp(x - y)."""
    dy, y = _like_input(t, node, dy, node.output[0])
    return t.add("Mul", dy, t.add("Exp", t.add("Sub", node.input[0], y)))


def _softmax_axes(t: Tape, node: NodeProto) -> list[int]:
    """Return the axes of a softmax; before opset 13 these are all axes from ``axis`` on."""
    rank, since_13 = len(t.dims(node.input[0])), t.builder.opset >= 13
    axis = int_attribute(node, "axis", -1 if since_13 else 1) % rank
    return [axis] if since_13 else list(range(axis, rank))


def _softmax(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = y (dy - sum(dy y))."""
    y = node.output[0]
    total = t.sum(t.add("Mul", dy, y), _softmax_axes(t, node), keepdims=True)
    return t.add("Mul", y, t.add("Sub", dy, total))


def _log_softmax(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = dy - exp(y) sum(dy)."""
    total = t.sum(dy, _softmax_axes(t, node), keepdims=True)
    return t.add("Sub", dy, t.add("Mul", t.add("Exp", node.output[0]), total))


# ---- quantizers of the training graph ----------------------------------------------------------------------
def _fake_quant(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """dx = dy where x is not clipped, else 0; the range ends half a step beyond the last integers."""
    x, scale = node.input[:2]
    zero = t.constant(node, 2)
    if zero is None:
        raise refusal(node, "it has no zero point")
    first, last = (
        int_attribute(node, f"quant_{end}", 0) - float(zero.reshape(-1)[0]) for end in ("min", "max")
    )
    ends = [t.reshape(t.add("Mul", scale, steps), []) for steps in (first - 0.5, last + 0.5)]
    return t.kept(dy, t.add("Equal", x, t.add("Clip", x, *ends)))


def _fake_quant_scale(t: Tape, node: NodeProto, k: int, dy: str) -> str:
    """ds = (<dy, y> - <dx, x>) / s, the LSQ rule."""
    products = [
        t.add("MatMul", t.reshape(g, [1, -1]), t.reshape(value, [-1, 1]))
        for g, value in ((dy, node.output[0]), (_fake_quant(t, node, 0, dy), node.input[0]))
    ]
    return t.add("Div", t.add("Reshape", t.add("Sub", *products), t.size(node.input[1])), node.input[1])


_SQRT_PI = float(np.sqrt(np.pi))

RULES: dict[tuple[str, str], tuple[Rule, ...]] = {
    # layers
    ("", "Conv"): (windows.convolution_input, windows.convolution_weight, windows.channel_sum),
    ("", "ConvTranspose"): (windows.transposed_input, windows.transposed_weight, windows.channel_sum),
    ("", "MatMul"): (_matmul, _matmul),
    ("", "Gemm"): (_gemm_left, _gemm_right, _gemm_offset),
    # pools
    ("", "AveragePool"): (windows.average_pool,),
    ("", "GlobalAveragePool"): (windows.global_average_pool,),
    ("", "MaxPool"): (windows.max_pool,),
    # elementwise
    ("", "Add"): (_broadcast(_same), _broadcast(_same)),
    ("", "Sub"): (_broadcast(_same), _broadcast(_negative)),
    ("", "Mul"): (_broadcast(_times_other), _broadcast(_times_other)),
    ("", "Div"): (_broadcast(_numerator), _broadcast(_denominator)),
    ("", "Pow"): (_broadcast(_base), _broadcast(_exponent)),
    ("", "Where"): (_nothing, _broadcast(_chosen), _broadcast(_chosen)),
    ("", "Relu"): (_unchanged,),
    ("", "Clip"): (_unchanged,),
    ("", "LeakyRelu"): (leaky_relu,),
    ("", "Abs"): (_slope(lambda t, x, y: t.add("Sign", x)),),
    ("", "Neg"): (_negative,),
    ("", "Exp"): (_slope(lambda t, x, y: y),),
    ("", "Log"): (lambda t, node, k, dy: t.add("Div", dy, node.input[0]),),
    ("", "Sqrt"): (lambda t, node, k, dy: t.add("Div", dy, t.add("Add", node.output[0], node.output[0])),),
    ("", "Reciprocal"): (_slope(lambda t, x, y: t.add("Neg", t.add("Mul", y, y))),),
    ("", "Sin"): (_slope(lambda t, x, y: t.add("Cos", x)),),
    ("", "Cos"): (_slope(lambda t, x, y: t.add("Neg", t.add("Sin", x))),),
    ("", "Erf"): (
        _slope(lambda t, x, y: t.add("Mul", t.add("Exp", t.add("Neg", t.add("Mul", x, x))), 2 / _SQRT_PI)),
    ),
    ("", "Sigmoid"): (_slope(lambda t, x, y: t.add("Mul", y, t.add("Sub", 1.0, y))),),
    ("", "Tanh"): (_slope(lambda t, x, y: t.add("Sub", 1.0, t.add("Mul", y, y))),),
    ("", "Cast"): (_cast,),
    # reductions
    ("", "ReduceSum"): (_spread,),
    ("", "ReduceMean"): (_spread_mean,),
    ("", "ReduceL2"): (_norm,),
    ("", "ReduceSumSquare"): (_squares,),
    ("", "ReduceLogSumExp"): (_log_sum_exp,),
    ("", "Softmax"): (_softmax,),
    ("", "LogSoftmax"): (_log_softmax,),
    # moves
    **{("", name): (moves.reshape,) for name in ["Reshape", "Flatten", "Squeeze", "Unsqueeze"]},
    ("", "Identity"): (_same,),
    ("", "Transpose"): (moves.transpose,),
    ("", "Slice"): (moves.slices,),
    ("", "Gather"): (moves.gather,),
    ("", "GatherElements"): (moves.gather_elements,),
    ("", "GatherND"): (moves.gather_nd,),
    ("", "ScatterElements"): (moves.overwritten, _nothing, moves.written_elements),
    ("", "ScatterND"): (moves.overwritten, _nothing, moves.written_slices),
    ("", "Expand"): (_broadcast(_same),),
    ("", "Tile"): (moves.tile,),
    ("", "Pad"): (moves.pad,),
    ("", "Trilu"): (moves.trilu,),
    # quantizers
    ("", "QuantizeLinear"): (_same,),
    ("", "DequantizeLinear"): (_same, _nothing),
    ("", "DynamicQuantizeLinear"): (_same,),
    (LSQ_DOMAIN, "FakeQuant"): (_fake_quant, _fake_quant_scale),
}
"""(domain, operator) to one rule per input."""

VARIADIC: dict[tuple[str, str], Rule] = {
    ("", "Concat"): moves.concat,
    ("", "Max"): _broadcast(_unchanged),
    ("", "Min"): _broadcast(_unchanged),
}
"""(domain, operator) to the rule that all inputs share."""


def rule_of(node: NodeProto, position: int) -> Rule | None:
    """Return the gradient rule of a node's input, or None."""
    key = ("" if node.domain == "ai.onnx" else node.domain, node.op_type)
    rules = RULES.get(key, ())
    return rules[position] if position < len(rules) else VARIADIC.get(key)
