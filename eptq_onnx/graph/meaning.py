"""What the outputs of a model are, as far as its graph tells: scores of classes, an embedding, boxes, ...

Where nothing tells, an output is taken for scores: a wrong guess then costs a figure that means nothing, and
not one that is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from onnx import ModelProto, NodeProto

from eptq_onnx.graph.view import GraphView, Shape, int_attribute
from eptq_onnx.numerics.statistics import Meaning

_LAYERS = frozenset({
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN", "MaxPool", "AveragePool",
    "GlobalAveragePool", "GlobalMaxPool", "Resize", "BatchNormalization", "InstanceNormalization",
    "GroupNormalization",
})  # fmt: skip
"""Operators behind which the walk from an output ends: what comes before is inside the network."""
_RESHAPES = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"})
_NORMS = frozenset({
    "LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization", "RMSNormalization",
    "LpNormalization",
})  # fmt: skip
"""Operators that give all vectors one length: what they make is compared by its direction."""
_LENGTHS = frozenset({"ReduceL2", "Sqrt"})
_BESIDE = frozenset({"Clip", "Max", "Expand", "Unsqueeze", "Squeeze", "Add", "Cast", "Identity", "Reshape"})
"""Operators between a length and the division by it."""
_VECTORS = re.compile(
    r"embed|hidden_state|pooler|pooled|feature|representation|(^|[_.])vectors?($|[_.])", re.I
)
_BOXES = re.compile(r"(^|[_./])(pred_)?(bbox|box|loc|coord)(es|s|ations|inates)?(reg)?($|[_./\d])", re.I)
_SCORES = re.compile(r"score|logit|prob|class|label|conf", re.I)
_FEW = 4
"""Numbers of a box."""


def meanings(model: ModelProto) -> dict[str, Meaning]:
    """Return what each output is.

    Parameters
    ----------
    model : ModelProto
        A float model, with inferred shapes where they are known.
    """
    view = GraphView(model)
    return {name: _meaning(view, name) for name in view.outputs}


def _meaning(view: GraphView, name: str) -> Meaning:
    shape = view.shape(name)
    if _BOXES.search(name) and not _SCORES.search(name):
        return Meaning.BOXES
    if _VECTORS.search(name) and not _SCORES.search(name):
        return Meaning.EMBEDDING
    if shape is None or _SCORES.search(name):
        return Meaning.SCORES
    found = _by_nodes(view, name, shape)
    if found is not None:
        return found
    if _are_boxes(view, shape):
        return Meaning.BOXES
    return Meaning.VALUES if _larger_picture(view, shape) else Meaning.SCORES


def _are_boxes(view: GraphView, shape: Shape) -> bool:
    """Return True for many rows of four numbers, made from a picture."""
    pictures = [s for i in view.inputs if (s := view.shape(i)) is not None and len(s) == 4]
    return bool(pictures) and len(shape) == 3 and (shape[2] == _FEW or (shape[1] == _FEW and shape[2] != 1))


def _larger_picture(view: GraphView, shape: Shape) -> bool:
    """Return True for a picture with as many channels as the input, and more pixels."""
    for name in view.inputs:
        own = view.shape(name)
        if own is None or len(own) != 4 or len(shape) != 4 or own[1] != shape[1]:
            continue
        sides = [(a, b) for a, b in zip(own[2:], shape[2:], strict=True) if a is not None and b is not None]
        return bool(sides) and all(b > a for a, b in sides)
    return False


def _by_nodes(view: GraphView, name: str, shape: Shape) -> Meaning | None:
    """Return what the nodes behind the last layers say; None if they say nothing."""
    channels = {d for d in (shape[1:2] + shape[2:][-1:]) if d is not None}
    for node in _behind_layers(view, name):
        if node.op_type == "Concat" and _joins_channels(view, node, channels):
            return Meaning.PARTS
        if len(shape) in (2, 3) and _normalizes(view, node):
            return Meaning.EMBEDDING
        if node.op_type in ("Softmax", "LogSoftmax"):
            return Meaning.SCORES
    return None


def _behind_layers(view: GraphView, name: str) -> Iterator[NodeProto]:
    """Yield the nodes between an output and the last layers, those near the output first."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        node = view.producer.get(waiting.pop(0))
        if node is None or node.output[0] in seen or node.op_type in _LAYERS:
            continue
        seen.add(node.output[0])
        yield node
        waiting += [i for i in node.input if i]


def _joins_channels(view: GraphView, node: NodeProto, channels: set[int]) -> bool:
    """Return True for a Concat of unlike parts along an axis that has the size of the output's channels.

    Parts are alike if they come from layers by the same operators: those are the positions of several scales.
    """
    shape = view.shape(node.output[0])
    axis = int_attribute(node, "axis", 0)
    if shape is None or shape[axis] not in channels or len(node.input) < 2:
        return False
    return len({_way(view, name, axis) for name in node.input}) > 1


def _way(view: GraphView, name: str, axis: int) -> tuple[object, ...]:
    """Return the operators from a tensor back to its layer, and its size along an axis, unless that moved."""
    found: list[str] = []
    shape = view.shape(name)
    while (node := view.producer.get(name)) is not None and node.op_type not in _LAYERS:
        found.append(node.op_type)
        varying = [i for i in node.input if i in view.varying]
        if not varying:
            break
        name = varying[0]
    moved = bool(_RESHAPES & set(found))
    return (None if moved or shape is None else shape[axis], *found)


def _normalizes(view: GraphView, node: NodeProto) -> bool:
    """Return True for a normalization of vectors, or a division by their lengths."""
    if node.op_type in _NORMS:
        return True
    if node.op_type != "Div":
        return False
    name, steps = node.input[1], 0
    while (maker := view.producer.get(name)) is not None and steps < len(_BESIDE):
        if maker.op_type in _LENGTHS:
            return True
        varying = [i for i in maker.input if i in view.varying]
        if maker.op_type not in _BESIDE or not varying:
            return False
        name, steps = varying[0], steps + 1
    return False
