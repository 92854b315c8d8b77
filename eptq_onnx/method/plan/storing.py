"""Decide which layers that stay float have quantized weights."""

from __future__ import annotations

import math
from collections.abc import Collection

from onnx import NodeProto

from eptq_onnx.method.plan.draft import Draft, weight_of
from eptq_onnx.numerics.formats import FLOATS
from eptq_onnx.ops import spec_of

PRODUCTS = ("Gemm", "MatMul")
"""Operators whose weights may have blocks."""
_NODES = 256
"""Bytes of the two nodes that turn integers into floats, with their names."""


def stored_nodes(draft: Draft, exact: Collection[str], block: int | None = None) -> set[str]:
    """Return the float layers whose weights are stored as integers.

    Parameters
    ----------
    draft : Draft
        With what runs on integers.
    exact : collection of str
        Tensors and nodes around which weights stay float.
    block : int, optional
        Size of the blocks of matrix products, whatever the target says of other weights.
    """
    weights = draft.target.weight
    if weights.container in FLOATS or (block is None and not weights.packed):
        return set()
    return {
        n.name
        for n in draft.view.nodes
        if n.name in draft.reasons
        and draft.is_weighted(n)
        and not {n.name, *n.input, *n.output, draft.final(n.output[0])} & set(exact)
        and (weights.packed or n.op_type in PRODUCTS)
        and _pays(n, draft, block)
    }


def _pays(node: NodeProto, draft: Draft, block: int | None) -> bool:
    """Return True if the weight is a finite float matrix or stack, and takes fewer bytes as integers."""
    view, weight = draft.view, weight_of(node)
    shape = view.constant_shape(weight)
    if len(shape) < 2 or not view.is_float(weight) or not view.is_finite(weight):
        return False
    if spec_of(node).objection(node, view) is not None:
        return False
    channels = shape[spec_of(node).weight_axis(node) % len(shape)]
    if block is not None and node.op_type in PRODUCTS:
        # A scale and a zero point for each block; a few nodes more.
        blocks = math.prod(shape) // block
        return 3 * math.prod(shape) > 5 * blocks + 4 * _NODES
    return 3 * math.prod(shape) > 4 * channels + _NODES
