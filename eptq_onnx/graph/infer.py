"""Types and shapes of all tensors."""

from __future__ import annotations

import onnx
from onnx import ModelProto, ValueInfoProto

from eptq_onnx import runtime
from eptq_onnx.errors import ModelError
from eptq_onnx.proto.weights import light, without_weights


def infer_shapes(model: ModelProto) -> ModelProto:
    """A copy with all types and shapes that can be told without running the model.

    What onnx cannot tell, the tensors behind operators of other domains, onnxruntime is asked for.
    """
    inferred = _inferred(model)
    known = {
        v.name
        for v in (*inferred.graph.value_info, *inferred.graph.output)
        if v.type.WhichOneof("value") is not None
    }
    unknown = [o for n in inferred.graph.node for o in n.output if o and o not in known]
    if not unknown:
        return inferred
    try:
        types = runtime.tensor_types(model, unknown)
    except ModelError:
        # Tensors that are not told stay float; who runs the model says what is wrong with it.
        return inferred
    inferred.graph.value_info.extend(
        ValueInfoProto(name=name, type=types[name]) for name in unknown if name in types
    )
    return _inferred(inferred)


def _inferred(model: ModelProto) -> ModelProto:
    """A copy with what onnx infers; the weights do not pass through."""
    inferred = onnx.shape_inference.infer_shapes(light(model)[0], data_prop=True)
    result = without_weights(model)
    result.graph.initializer.extend(model.graph.initializer)
    for name in ("node", "value_info", "output"):
        field = getattr(result.graph, name)
        del field[:]
        field.extend(getattr(inferred.graph, name))
    return result
