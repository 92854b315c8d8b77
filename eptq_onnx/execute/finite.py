"""Removal of NaN and infinity from graphs that are differentiated.

0 times NaN or infinity is NaN, so a single such value spoils the whole gradient. It can occur at positions
that no output depends on: fully masked rows of an attention, padded tokens, a log(0) that a Where discards.
In the copy of a model that gradients pass through, infinite constants become large finite numbers (a fully
masked row is then uniform), and a value that is not finite although all operands are becomes 0, without a
gradient. For elementwise functions: ``f(x) → where(ok, f(where(ok, x, c)), 0)``, ok where f(x) is finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, numpy_helper

from eptq_onnx.execute.blocks import Block, cut, reduced
from eptq_onnx.graph import edit
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.view import STOP, GraphView
from eptq_onnx.numerics.quant_math import all_finite
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.proto.bodies import all_nodes, node_reads, subgraphs

LARGE = 1e30
"""Finite replacement for infinity."""
_LIMIT = 3e38
"""Absolute value below which a float32 counts as finite."""
_HARMLESS = 0.5
"""Argument at which elementwise functions and their slopes are finite."""
_STEEP_AT_ZERO, _LEAST = {"Sqrt"}, 1e-15
"""Functions with infinite slope where they are 0, and the value above which their slope is used."""
_ROUNDS = 3

IsElementwise = Callable[[NodeProto], bool]


def has_infinite_source(view: GraphView, tensor: str) -> bool:
    """Return True if a constant upstream of a tensor, such as a mask, is not finite."""
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
    batches: Callable[[], Iterable[Feeds]],
    most: int | None,
    is_elementwise: IsElementwise,
) -> ModelProto | None:
    """Return a copy of a model without NaN and infinity, or None if none occurs that could spoil a gradient.

    Parameters
    ----------
    model : ModelProto
        With the shapes of one batch.
    compared : sequence of str
        Tensors whose values are compared.
    batches : callable
        Returns the inputs on which the model is checked, batch by batch.
    most : int or None
        Limit of a block in bytes; see `eptq_onnx.execute.blocks.cut`.
    is_elementwise : callable
        Node to True if it is an elementwise function.
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


def _not_finite(
    model: ModelProto, batches: Callable[[], Iterable[Feeds]], most: int | None
) -> dict[str, bool]:
    """Return the computed float tensors with non-finite values, each with True if some are NaN."""
    view = GraphView(model)
    wanted = [name for name in view.producer if view.is_float(name)]
    found: dict[str, bool] = {}
    blocks = [Block(model)] if most is None else cut(model, model, most)

    def broken(_: int, name: str, value: NDArray[Any]) -> tuple[bool, bool]:
        lost = value.dtype.kind == "f" and not all_finite(value)
        return lost, lost and bool(np.isnan(value).any())

    for _, values in reduced(blocks, batches(), wanted, broken):
        for name, (lost, has_nan) in values.items():
            if lost:
                found[name] = found.get(name, False) or has_nan
    return found


def _bounded(model: ModelProto) -> ModelProto:
    """Return a copy in which infinite constants are large finite numbers."""
    view = GraphView(model)
    infinite = [name for name in view.initializers if view.is_float(name) and not view.is_finite(name)]
    values = {
        n: np.nan_to_num(view.constant(n), nan=np.nan, posinf=LARGE, neginf=-LARGE).astype(np.float32)
        for n in infinite
    }
    return edit.with_constants(model, values)


def _without(model: ModelProto, found: Iterable[str], is_elementwise: IsElementwise) -> ModelProto:
    """Return a copy in which nodes that turn finite operands into non-finite values produce 0 instead."""
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
    """Add a mask of the finite elements of a tensor, through which no gradient passes."""
    ok = builder.add("Less", [builder.add("Abs", [tensor]), _LIMIT])
    for node in builder.nodes[-2:]:
        node.doc_string = STOP
    return ok


def kept(builder: edit.Builder, value: str, reference: str) -> str:
    """Add a tensor that is ``value`` where ``reference`` is finite, else 0."""
    return builder.add("Where", [_is_number(builder, reference), value, 0.0])
