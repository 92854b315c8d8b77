"""Products of tensors: MatMul, Pow, Einsum."""

from __future__ import annotations

import re

import numpy as np
from onnx import NodeProto, TensorProto

from eptq_onnx.graph.edit import Builder
from eptq_onnx.graph.lower.base import (
    TINY,
    NotLowerable,
    ints,
    rank_of,
    reshape,
    shape_of,
    stopped,
    transpose,
)
from eptq_onnx.graph.view import GraphView, attribute


def matmul(node: NodeProto, view: GraphView, b: Builder) -> None:
    """MatMul of vectors → MatMul of matrices with one row or column, squeezed out of the result."""
    ranks = [rank_of(view, i) for i in node.input]
    if min(ranks) > 1:
        b.nodes.append(node)
        return
    x, y = node.input
    if ranks[0] == 1:
        x = b.add("Unsqueeze", [x, ints([0])])
    if ranks[1] == 1:
        y = b.add("Unsqueeze", [y, ints([1])])
    axes = [axis for axis, rank in zip((-2, -1), ranks, strict=True) if rank == 1]
    b.add("Squeeze", [b.add("MatMul", [x, y]), ints(axes)], node.output[0])


def power(node: NodeProto, view: GraphView, b: Builder) -> None:
    """x^e with slopes e x^(e - 1) and x^e log(x), as in `by_slope`; unchanged if e is one constant."""
    x, e = node.input
    if view.is_constant(e) and view.is_float(e) and view.constant(e).size == 1:
        b.nodes.append(node)
        return
    if not view.is_float(e):
        e = b.add("Cast", [e], to=TensorProto.FLOAT)
    fixed_x, fixed_e = stopped(b, "Identity", [x]), stopped(b, "Identity", [e])
    y = stopped(b, "Pow", [fixed_x, fixed_e])
    beside = b.add("Where", [b.add("Equal", [fixed_x, 0.0]), TINY, fixed_x])
    slopes = (
        b.add("Mul", [fixed_e, stopped(b, "Pow", [beside, b.add("Sub", [fixed_e, 1.0])])]),
        b.add("Mul", [y, b.add("Log", [b.add("Clip", [fixed_x, TINY])])]),
    )
    for name, fixed, slope in zip((x, e), (fixed_x, fixed_e), slopes, strict=True):
        y = b.add("Add", [y, b.add("Mul", [b.add("Sub", [name, fixed]), stopped(b, "Identity", [slope])])])
    b.add("Identity", [y], node.output[0])


def einsum(node: NodeProto, view: GraphView, b: Builder) -> None:
    """Einsum → one MatMul per pair, from left to right; labels no longer needed are summed out first."""
    shapes = [shape_of(view, i) for i in node.input]
    terms, result = _labels(str(attribute(node, "equation")), [len(s) for s in shapes])
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for label, size in zip(term, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    operands = [
        _diagonal(b, name, term, shape, sizes)
        for name, term, shape in zip(node.input, terms, shapes, strict=True)
    ]
    x, labels = operands[0]
    for k, (y, more) in enumerate(operands[1:], 1):
        later = set(result).union(*(term for _, term in operands[k + 1 :]))
        x, labels = _contract(b, (x, labels), (y, more), later, sizes)
    x, labels = _summed(b, x, labels, set(result))
    transpose(b, x, [labels.index(label) for label in result], node.output[0])


def _labels(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Return the labels of each operand and of the result.

    The axes of an ellipsis are labelled by digits, the last one by 0. Raises `NotLowerable` for an ellipsis
    of more than ten axes.
    """
    left, arrow, right = re.sub(r"\s", "", equation).partition("->")
    terms = left.split(",")
    hidden = [
        rank - len(term.replace("...", "")) if "..." in term else 0
        for term, rank in zip(terms, ranks, strict=True)
    ]
    if max(hidden) > 10:
        raise NotLowerable("its ellipsis stands for more than ten axes")
    spelled = [
        term.replace("...", "".join(str(d) for d in reversed(range(h))))
        for term, h in zip(terms, hidden, strict=True)
    ]
    wide = "".join(str(d) for d in reversed(range(max(hidden))))
    if arrow:
        return spelled, right.replace("...", wide)
    joined = left.replace("...", "").replace(",", "")
    return spelled, wide + "".join(sorted(c for c in set(joined) if joined.count(c) == 1))


def _diagonal(
    b: Builder, x: str, labels: str, shape: tuple[int, ...], sizes: dict[str, int]
) -> tuple[str, str]:
    """Reduce repeated labels of an operand to their diagonal, and expand sizes of 1.

    All elements off the diagonal are multiplied by 0, then the repeated axes are summed out.
    """
    kept = "".join(dict.fromkeys(labels))
    if len(kept) < len(labels):
        for label in kept:
            places = [a for a, other in enumerate(labels) if other == label]
            for place in places[1:]:
                around = [sizes[label] if a in (places[0], place) else 1 for a in range(len(labels))]
                x = b.add("Mul", [x, np.eye(sizes[label], dtype=np.float32).reshape(around)])
        x = b.reduce("ReduceSum", x, [a for a, label in enumerate(labels) if label in labels[:a]])
    wanted = [sizes[label] for label in kept]
    if [shape[labels.index(label)] for label in kept] != wanted:
        x = b.add("Expand", [x, np.array(wanted, np.int64)])
    return x, kept


def _summed(b: Builder, x: str, labels: str, needed: set[str]) -> tuple[str, str]:
    axes = [a for a, label in enumerate(labels) if label not in needed]
    return (b.reduce("ReduceSum", x, axes) if axes else x), "".join(
        label for label in labels if label in needed
    )


def _contract(
    b: Builder, left: tuple[str, str], right: tuple[str, str], later: set[str], sizes: dict[str, int]
) -> tuple[str, str]:
    """Contract two operands by one batched MatMul: (shared, left, summed) times (shared, summed, right)."""
    x, first = _summed(b, *left, later | set(right[1]))
    y, second = _summed(b, *right, later | set(first))
    shared = "".join(c for c in first if c in second and c in later)
    summed = "".join(c for c in first if c in second and c not in later)
    own, others = "".join(c for c in first if c not in second), "".join(c for c in second if c not in first)

    def product(labels: str) -> int:
        return int(np.prod([sizes[c] for c in labels]))

    rows = reshape(
        b,
        transpose(b, x, [first.index(c) for c in shared + own + summed]),
        [product(shared), product(own), product(summed)],
    )
    columns = reshape(
        b,
        transpose(b, y, [second.index(c) for c in shared + summed + others]),
        [product(shared), product(summed), product(others)],
    )
    labels = shared + own + others
    return reshape(b, b.add("MatMul", [rows, columns]), [sizes[c] for c in labels]), labels
