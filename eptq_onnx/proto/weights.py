"""Separation of models from their weights, so that copies of a graph need not copy its weights."""

from __future__ import annotations

from collections.abc import Container, Sequence

from onnx import ModelProto, TensorProto, helper

from eptq_onnx.proto import store
from eptq_onnx.proto.bodies import initializers, node_reads


def without_weights(model: ModelProto) -> ModelProto:
    """Return a copy of a model without the initializers of its main graph."""
    result = ModelProto()
    for source, copy, left_out in ((model, result, "graph"), (model.graph, result.graph, "initializer")):
        for field, value in source.ListFields():
            if field.name == left_out:
                continue
            if field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED:
                getattr(copy, field.name).extend(value)
            elif field.message_type is not None:
                getattr(copy, field.name).CopyFrom(value)
            else:
                setattr(copy, field.name, value)
    return result


def stored(model: ModelProto, folder: str) -> ModelProto:
    """Return a copy of a model whose large weights are in files in the folder."""
    result = without_weights(model)
    for tensor in initializers(result.graph):
        tensor.CopyFrom(store.stored(tensor, folder))
    result.graph.initializer.extend(store.stored(t, folder) for t in model.graph.initializer)
    return result


_HEAVY = 4096
"""Size in bytes above which shape inference and the version converter have no use for a constant's value."""


def light(model: ModelProto, needed: Container[str] = ()) -> tuple[ModelProto, list[TensorProto]]:
    """Return a copy in which large initializers are inputs, and these initializers, for `with_weights`.

    The passes of onnx and onnx-graphsurgeon copy their input, some of them several times. The initializers
    named in ``needed`` stay in the graph.
    """
    heavy = [
        t
        for t in model.graph.initializer
        if (store.is_stored(t) or len(t.raw_data) > _HEAVY) and t.name not in needed
    ]
    names = {t.name for t in heavy}
    result = without_weights(model)
    result.graph.initializer.extend(store.loaded(t) for t in model.graph.initializer if t.name not in names)
    present = {i.name for i in model.graph.input}
    stand_ins = [
        helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        for t in heavy
        if t.name not in present
    ]
    result.graph.input.extend(stand_ins)
    return result, heavy


def with_weights(model: ModelProto, weights: Sequence[TensorProto]) -> ModelProto:
    """Turn the inputs that `light` made back into initializers, in place, and return the model.

    Weights that nothing reads are dropped.
    """
    names = {t.name for t in weights}
    inputs = [i for i in model.graph.input if i.name not in names]
    read = {i for n in model.graph.node for i in node_reads(n)} | {o.name for o in model.graph.output}
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(t for t in weights if t.name in read)
    return model
