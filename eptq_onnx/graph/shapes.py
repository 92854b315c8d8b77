"""Shapes of everything, for inputs of fixed shapes: inferred where inference gets, observed where it does
not."""

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
    """A copy whose inputs and tensors have fixed shapes.

    Inference ends at shapes that are computed in ways that it does not follow; these are observed by running
    the batches. A shape in which two of them differ depends on values, and stays unknown.

    Parameters
    ----------
    model : ModelProto
    batches : sequence of Feeds
        The inputs, all of the same shapes.

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
    known = _observed(result, unknown, batches[0])
    for feeds in batches[1:]:
        again = _observed(result, unknown, feeds)
        known = {name: seen for name, seen in known.items() if again.get(name) == seen}
    return _with_shapes(result, known)


def empty_tensor(model: ModelProto) -> str | None:
    """A computed float tensor without elements, for the shapes that the model has; None if there is none.

    Such are rows that were chosen by value, where none was: onnxruntime's gradient kernels crash on them.
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
    """The model with the observed number of axes where inference does not tell it; itself if it tells all."""
    view = GraphView(model)
    unknown = [o for n in view.nodes for o in n.output if o and view.shape(o) is None]
    if not unknown:
        return model
    known = {
        name: (elem_type, (None,) * len(shape))
        for name, (elem_type, shape) in _observed(model, unknown, feeds).items()
    }
    return _with_shapes(edit.with_nodes(model, model.graph.node), known)


def _observed(model: ModelProto, tensors: Sequence[str], feeds: Feeds) -> dict[str, Known]:
    session = Session(edit.exposing(model, tensors))
    values = session.run(session.taken(feeds), tensors)
    # Sequences and strings have no place in the table.
    plain = {name: v for name, v in values.items() if isinstance(v, np.ndarray) and v.dtype != object}
    return {name: (helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for name, v in plain.items()}


def _with_shapes(model: ModelProto, known: Mapping[str, Known]) -> ModelProto:
    """The model, changed, with these types and shapes, and what follows from them."""
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
