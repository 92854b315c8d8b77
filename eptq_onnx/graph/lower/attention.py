"""Fused attention of onnxruntime's transformer optimizer, decomposed.

Source: onnxruntime, ContribOperators.md: Attention, MultiHeadAttention.
"""

from __future__ import annotations

import itertools

import numpy as np
from onnx import NodeProto, TensorProto

from eptq_onnx.graph.edit import Builder
from eptq_onnx.graph.lower.base import NotLowerable, given, ints, number, reshape, shape_of, transpose, unused
from eptq_onnx.graph.view import GraphView, int_attribute, ints_attribute


def attention(node: NodeProto, view: GraphView, b: Builder) -> None:
    """Compute queries, keys and values by one MatMul, then `_attend`."""
    unused(node)
    if given(node, 4) or int_attribute(node, "do_rotary", 0):
        raise NotLowerable("it keeps past keys or rotates them")
    batch, length, _ = shape_of(view, node.input[0])
    width = shape_of(view, node.input[1])[1]
    sizes = ints_attribute(node, "qkv_hidden_sizes") or [width // 3] * 3
    joint = b.add("MatMul", node.input[:2])
    if given(node, 2):
        joint = b.add("Add", [joint, node.input[2]])
    ends = np.cumsum([0, *sizes]).tolist()
    parts = [b.add("Slice", [joint, ints([s]), ints([e]), ints([2])]) for s, e in itertools.pairwise(ends)]
    bias = _mask(node, view, b, given(node, 3), batch, length)
    if given(node, 5):
        bias = [*bias, node.input[5]]
    _attend(node, b, parts, (batch, length, length), sizes, bias)


def multi_head_attention(node: NodeProto, view: GraphView, b: Builder) -> None:
    """Add to queries, keys and values, given separately, their part of the bias, then `_attend`."""
    unused(node)
    if any(given(node, k) for k in (6, 7)) or not (given(node, 1) and given(node, 2)):
        raise NotLowerable("its keys are packed or kept from the past")
    shapes = [shape_of(view, i) for i in node.input[:3]]
    if any(len(s) != 3 for s in shapes):
        raise NotLowerable("its heads are separate")
    sizes = [s[2] for s in shapes]
    parts = list(node.input[:3])
    if given(node, 3):
        ends = np.cumsum([0, *sizes]).tolist()
        shares = [
            b.add("Slice", [node.input[3], ints([s]), ints([e]), ints([0])])
            for s, e in itertools.pairwise(ends)
        ]
        parts = [b.add("Add", pair) for pair in zip(parts, shares, strict=True)]
    batch, length, keys = shapes[0][0], shapes[0][1], shapes[1][1]
    bias = _mask(node, view, b, given(node, 4), batch, keys)
    if given(node, 5):
        bias = [*bias, node.input[5]]
    _attend(node, b, parts, (batch, length, keys), sizes, bias)


def _mask(node: NodeProto, view: GraphView, b: Builder, mask: str, batch: int, keys: int) -> list[str]:
    """Return the terms that a mask adds to the attention scores; none without a mask."""
    if not mask:
        return []
    shape = shape_of(view, mask)
    if shape == (batch,):
        lengths = b.add("Cast", [reshape(b, mask, [batch, 1, 1, 1])], to=TensorProto.INT64)
        seen = b.add("Cast", [b.add("Less", [np.arange(keys), lengths])], to=TensorProto.FLOAT)
    elif shape == (batch, keys):
        seen = b.add("Cast", [reshape(b, mask, [batch, 1, 1, keys])], to=TensorProto.FLOAT)
    elif len(shape) == 3:
        seen = b.add("Cast", [reshape(b, mask, [shape[0], 1, *shape[1:]])], to=TensorProto.FLOAT)
    else:
        raise NotLowerable(f"its mask has the shape {shape}")
    return [b.add("Mul", [b.add("Sub", [1.0, seen]), number(node, "mask_filter_value", -10000.0)])]


def _attend(
    node: NodeProto,
    b: Builder,
    parts: list[str],
    shape: tuple[int, int, int],
    sizes: list[int],
    bias: list[str],
) -> None:
    """y = softmax(scale q k^T + bias) v, head by head."""
    batch, length, keys = shape
    heads = int_attribute(node, "num_heads", 1)
    q, k, v = (
        transpose(b, reshape(b, part, [batch, n, heads, size // heads]), order)
        for part, n, size, order in zip(
            parts, (length, keys, keys), sizes, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True
        )
    )
    scale = number(node, "scale", 0.0) or 1 / np.sqrt(sizes[0] // heads)
    scores = b.add("Mul", [b.add("MatMul", [q, k]), float(scale)])
    for term in bias:
        scores = b.add("Add", [scores, term])
    if int_attribute(node, "unidirectional", 0):
        if length != keys:
            raise NotLowerable("it is unidirectional with different numbers of queries and keys")
        allowed = np.tril(np.ones((length, keys), np.bool_))
        scores = b.add("Where", [allowed, scores, float(np.finfo(np.float32).min)])
    mixed = b.add("MatMul", [b.add("Softmax", [scores], axis=-1), v])
    reshape(b, transpose(b, mixed, [0, 2, 1, 3]), [batch, length, sizes[2]], node.output[0])
