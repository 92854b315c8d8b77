"""Models apart from their weights: what passes only through copies should not copy these."""

from __future__ import annotations

from collections.abc import Container, Sequence

from onnx import ModelProto, TensorProto, helper

from eptq_onnx.proto import store
from eptq_onnx.proto.bodies import initializers, node_reads


def without_weights(model: ModelProto) -> ModelProto:
    """A copy of everything but the initializers."""
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
    """A copy whose heavy weights are in files of the folder."""
    result = without_weights(model)
    for tensor in initializers(result.graph):
        tensor.CopyFrom(store.stored(tensor, folder))
    result.graph.initializer.extend(store.stored(t, folder) for t in model.graph.initializer)
    return result


_HEAVY = 4096
"""Bytes above which a constant's value is of no use to shape inference and the version converter."""


def light(model: ModelProto, needed: Container[str] = ()) -> tuple[ModelProto, list[TensorProto]]:
    """A copy in which heavy initializers, but those ``needed``, are inputs; and these initializers, for
    `with_weights`.

    What goes through onnx's and onnx-graphsurgeon's passes is copied there, some of it several times.
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
    """The model, changed, with initializers in place of the inputs that stood for them, as far as anybody
    reads them."""
    names = {t.name for t in weights}
    inputs = [i for i in model.graph.input if i.name not in names]
    read = {i for n in model.graph.node for i in node_reads(n)} | {o.name for o in model.graph.output}
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(t for t in weights if t.name in read)
    return model
