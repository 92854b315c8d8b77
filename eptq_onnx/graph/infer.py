"""Inference of the types and shapes of all tensors."""

from __future__ import annotations

import onnx
from onnx import ModelProto, ValueInfoProto

from eptq_onnx import runtime
from eptq_onnx.errors import ModelError
from eptq_onnx.proto.weights import light, without_weights


def infer_shapes(model: ModelProto) -> ModelProto:
    """Return a copy with all types and shapes that can be inferred without running the model.

    For what onnx cannot infer, such as tensors downstream of operators of other domains, onnxruntime is used.
    """
    result = inferred(model)
    known = {
        v.name
        for v in (*result.graph.value_info, *result.graph.output)
        if v.type.WhichOneof("value") is not None
    }
    unknown = [o for n in result.graph.node for o in n.output if o and o not in known]
    if not unknown:
        return result
    try:
        types = runtime.tensor_types(model, unknown)
    except ModelError:
        # Tensors of unknown type stay float; whatever runs the model reports what is wrong with it.
        return result
    result.graph.value_info.extend(
        ValueInfoProto(name=name, type=types[name]) for name in unknown if name in types
    )
    return inferred(result)


def inferred(model: ModelProto) -> ModelProto:
    """Return a copy with what onnx infers; the weights are not passed to onnx."""
    found = onnx.shape_inference.infer_shapes(light(model)[0], data_prop=True)
    result = without_weights(model)
    result.graph.initializer.extend(model.graph.initializer)
    for name in ("node", "value_info", "output"):
        field = getattr(result.graph, name)
        del field[:]
        field.extend(getattr(found.graph, name))
    return result
