"""Numbers that are none, NaN and infinity, in graphs that are differentiated: 0 times them is NaN, so that
one spoils all.

Positions may hold them that no output depends on: rows of an attention that are masked altogether, padded
tokens, log(0) that a Where leaves out. In the copy of a model that gradients pass, infinite constants become
large numbers (a row that is masked altogether is then uniform), and what a node makes of nothing but numbers
that is none becomes 0, with no gradient: ``y = where(ok, f(where(ok, x, c)), 0)``, for functions of single
elements, with ok where f(x) is a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto, numpy_helper

from eptq_onnx.execute.blocks import Block, cut, observe
from eptq_onnx.graph import edit
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.view import STOP, GraphView
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.proto.bodies import all_nodes, node_reads, subgraphs

LARGE = 1e30
"""Stands for infinity."""
_LIMIT = 3e38
"""What is smaller is a number, in float32."""
_HARMLESS = 0.5
"""Argument at which functions and their slopes are numbers."""
_STEEP_AT_ZERO, _LEAST = {"Sqrt"}, 1e-15
"""Functions that are 0 where their slope is infinite, and what of theirs counts as more than 0."""
_ROUNDS = 3

IsElementwise = Callable[[NodeProto], bool]


def has_infinite_source(view: GraphView, tensor: str) -> bool:
    """True if the model itself brings infinity into a tensor: a constant of it is upstream, such as a
    mask."""
    needed = view.upstream([tensor])
    if any(view.is_float(name) and not view.is_finite(name) for name in needed if view.is_constant(name)):
        return True
    nodes = [n for n in view.nodes if any(o in needed for o in n.output)]
    inside = (n for node in nodes for graph in subgraphs(node) for n in all_nodes(graph))
    return any(_is_infinite(a) for n in (*nodes, *inside) for a in n.attribute)


def _is_infinite(attribute: AttributeProto) -> bool:
    if attribute.type == AttributeProto.FLOAT:
        return bool(np.isinf(attribute.f))
    if attribute.type != AttributeProto.TENSOR:
        return False
    value = numpy_helper.to_array(attribute.t)
    return value.dtype.kind == "f" and bool(np.isinf(value).any())


def differentiable(
    model: ModelProto,
    compared: Sequence[str],
    batches: Sequence[Feeds],
    most: int | None,
    is_elementwise: IsElementwise,
) -> ModelProto | None:
    """The model without numbers that are none; None if there are none on these batches that could spoil a
    gradient.

    Parameters
    ----------
    model : ModelProto
        With the shapes of one batch.
    compared : sequence of str
        Tensors whose values are compared.
    batches : sequence of Feeds
    most : int or None
        Bytes of a block; see `eptq_onnx.execute.blocks.cut`.
    is_elementwise : callable
        True for a function of single elements.
    """
    found = _not_finite(model, batches, most)
    if not found:
        return None
    result = _bounded(model)
    left = _not_finite(result, batches, most)
    if not left and not any(found.values()) and not found.keys() & set(compared):
        return None
    for _ in range(_ROUNDS):
        if not left:
            break
        result = _without(result, left.keys(), is_elementwise)
        left = _not_finite(result, batches, most)
    return result


def _not_finite(model: ModelProto, batches: Sequence[Feeds], most: int | None) -> dict[str, bool]:
    """The computed float tensors that somewhere are no number, and if they are NaN."""
    view = GraphView(model)
    wanted = [name for name in view.producer if view.is_float(name)]
    found: dict[str, bool] = {}
    blocks = [Block(model)] if most is None else cut(model, model, most)
    for _, values in observe(blocks, batches, wanted):
        for name, value in values.items():
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                found[name] = found.get(name, False) or bool(np.isnan(value).any())
    return found


def _bounded(model: ModelProto) -> ModelProto:
    """Infinite constants made large."""
    view = GraphView(model)
    infinite = [name for name in view.initializers if view.is_float(name) and not view.is_finite(name)]
    values = {
        n: np.nan_to_num(view.constant(n), nan=np.nan, posinf=LARGE, neginf=-LARGE).astype(np.float32)
        for n in infinite
    }
    return edit.with_constants(model, values)


def _without(model: ModelProto, found: Iterable[str], is_elementwise: IsElementwise) -> ModelProto:
    """The nodes that make such values of numbers make 0 instead."""
    view, broken = GraphView(model), set(found)
    builder = edit.Builder(model, "finite/")
    nodes: list[NodeProto] = []
    for node in view.nodes:
        spoiled = [o for o in node.output if o in broken]
        if not spoiled or any(i in broken for i in node_reads(node)):
            nodes.append(node)
            continue
        begin = len(builder.nodes)
        raw = {o: builder.unique(f"{o}/raw") for o in spoiled}
        builder.nodes.append(edit.renamed(node, raw))
        for output in spoiled:
            ok = _is_number(builder, raw[output])
            value = raw[output]
            if is_elementwise(node):
                if node.op_type in _STEEP_AT_ZERO:
                    ok = builder.add("And", [ok, builder.add("Less", [_LEAST, raw[output]])])
                safe = {i: builder.add("Where", [ok, i, _HARMLESS]) for i in node.input if view.is_float(i)}
                value = builder.unique(f"{output}/safe")
                copy = edit.renamed(node, {**safe, output: value})
                copy.name = builder.unique(f"{node.name}/safe")
                builder.nodes.append(copy)
            builder.add("Where", [ok, value, 0.0], output)
        nodes.extend(builder.nodes[begin:])
    result = edit.with_nodes(model, nodes, builder.initializers)
    return infer_shapes(result)


def _is_number(builder: edit.Builder, tensor: str) -> str:
    """Where a tensor is finite; no gradient passes."""
    ok = builder.add("Less", [builder.add("Abs", [tensor]), _LIMIT])
    for node in builder.nodes[-2:]:
        node.doc_string = STOP
    return ok


def kept(builder: edit.Builder, value: str, reference: str) -> str:
    """The value where a reference is a number, else 0."""
    return builder.add("Where", [_is_number(builder, reference), value, 0.0])
