"""Shapes of all tensors for fixed input shapes: inferred where possible, otherwise observed in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import ModelProto, helper

from eptq_onnx.graph import edit
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.runtime import Session

Known = tuple[int, tuple[int | None, ...]]
"""Element type and shape."""


def specialize(model: ModelProto, batches: Sequence[Feeds]) -> ModelProto:
    """Return a copy whose inputs and tensors have fixed shapes.

    Shapes that inference cannot derive are observed by running the batches. A shape that differs between
    batches depends on values, and stays unknown.

    Parameters
    ----------
    model : ModelProto
    batches : sequence of Feeds
        Inputs, the same shapes in each batch.

    Raises
    ------
    ModelError
        If onnxruntime cannot run the model.
    """
    result = edit.specialize(model, {name: value.shape for name, value in batches[0].items()})
    view = GraphView(result)
    unknown = [o for n in view.nodes for o in n.output if o and view.static_shape(o) is None]
    if not unknown:
        return result
    known, *others = _observed(result, unknown, batches)
    for again in others:
        known = {name: seen for name, seen in known.items() if again.get(name) == seen}
    return _with_shapes(result, known)


def empty_tensor(model: ModelProto) -> str | None:
    """Return the name of a computed float tensor without elements, or None.

    Such a tensor arises if rows are chosen by value and none qualifies; onnxruntime's gradient kernels crash
    on it. Shapes are those that the model declares.
    """
    view = GraphView(model)
    return next(
        (
            o
            for n in view.nodes
            for o in n.output
            if o and view.is_float(o) and 0 in (view.static_shape(o) or ())
        ),
        None,
    )


def with_ranks(model: ModelProto, feeds: Feeds) -> ModelProto:
    """Return a model with observed ranks where inference finds none; itself if no rank is unknown."""
    view = GraphView(model)
    unknown = [o for n in view.nodes for o in n.output if o and view.shape(o) is None]
    if not unknown:
        return model
    known = {
        name: (elem_type, (None,) * len(shape))
        for name, (elem_type, shape) in _observed(model, unknown, [feeds])[0].items()
    }
    return _with_shapes(edit.with_nodes(model, model.graph.node), known)


def _observed(model: ModelProto, tensors: Sequence[str], batches: Sequence[Feeds]) -> list[dict[str, Known]]:
    """Return what is seen of the tensors in each batch, in one session."""
    session = Session(edit.exposing(model, tensors))
    found: list[dict[str, Known]] = []
    for feeds in batches:
        values = session.run(session.taken(feeds), tensors)
        # Sequences and strings have no entry in the table.
        plain = {name: v for name, v in values.items() if isinstance(v, np.ndarray) and v.dtype != object}
        found.append(
            {name: (int(helper.np_dtype_to_tensor_dtype(v.dtype)), v.shape) for name, v in plain.items()}
        )
    return found


def _with_shapes(model: ModelProto, known: Mapping[str, Known]) -> ModelProto:
    """Declare types and shapes, in place, and return a copy with everything inferred from them."""
    kept = [v for v in model.graph.value_info if v.name not in known]
    outputs = {o.name for o in model.graph.output}
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    model.graph.value_info.extend(
        helper.make_tensor_value_info(name, elem_type, list(shape))
        for name, (elem_type, shape) in known.items()
        if name not in outputs
    )
    for info in model.graph.output:
        if info.name in known:
            elem_type, shape = known[info.name]
            info.CopyFrom(helper.make_tensor_value_info(info.name, elem_type, list(shape)))
    return infer_shapes(model)
