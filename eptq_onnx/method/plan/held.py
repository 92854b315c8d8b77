"""Decide which weights of float operators that are no layers, as LSTM and GRU, are stored as integers."""

from __future__ import annotations

import math
from collections.abc import Collection

from onnx import NodeProto

from eptq_onnx.method.plan.draft import Draft
from eptq_onnx.numerics.formats import FLOATS
from eptq_onnx.ops import spec_of
from eptq_onnx.records import HeldWeight, Layer

_BITS = 8
"""Width unless a rule of the user names the node. A recurrent layer repeats the error of its weights at every
step, and nothing here corrects it."""
_NODES = 256
"""Bytes of the nodes that turn integers into floats, with their names."""


def held_weights(draft: Draft, layers: tuple[Layer, ...], exact: Collection[str]) -> tuple[HeldWeight, ...]:
    """Return the weights, each with one scale per channel, and state so as the reason of their nodes.

    Parameters
    ----------
    draft : Draft
        With what runs on integers.
    layers : tuple of Layer
        Their weights are planned already.
    exact : collection of str
        Tensors and nodes around which weights stay float.
    """
    target, view = draft.target, draft.view
    if not target.weight.packed or target.weight.container in FLOATS:
        return ()
    found: dict[str, HeldWeight] = {}
    bits_of: dict[str, int] = {}
    taken = {layer.weight for layer in layers}
    for node in view.nodes:
        for tensor, axis in _weights(node, draft).items():
            if tensor in taken or {node.name, *node.input, *node.output} & set(exact):
                continue
            wanted = draft.bits[node.name][0] if node.name in draft.bits else _BITS
            bits_of[tensor] = max(bits_of.get(tensor, 0), wanted)
            found[tensor] = HeldWeight(tensor, (tensor,), target.held_spec(bits_of[tensor], axis))
            draft.reasons[node.name] = (
                f"its weights are stored in {bits_of[tensor]} bits with one scale per channel; "
                "it computes in float"
            )
    return tuple(found.values())


def _weights(node: NodeProto, draft: Draft) -> dict[str, int]:
    """Return the constants of a node for which integers take fewer bytes, each with its channel axis."""
    view, found = draft.view, {}
    for place, axis in spec_of(node).held.items():
        name = node.input[place] if place < len(node.input) else ""
        if not view.is_constant(name) or not view.is_float(name) or not view.is_finite(name):
            continue
        shape = view.constant_shape(name)
        if axis < len(shape) and 3 * math.prod(shape) > 4 * shape[axis] + _NODES:
            found[name] = axis
    return found
