"""Types and shapes of all tensors."""

from __future__ import annotations

import onnx
from onnx import ModelProto, helper

from eptq_onnx import runtime
from eptq_onnx.errors import ModelError


def infer_shapes(model: ModelProto) -> ModelProto:
    """A copy with all types and shapes that can be told without running the model.

    What onnx cannot tell, the tensors behind operators of other domains, onnxruntime is asked for.
    """
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    known = {v.name for v in (*inferred.graph.value_info, *inferred.graph.output)}
    unknown = [o for n in inferred.graph.node for o in n.output if o and o not in known]
    if not unknown:
        return inferred
    try:
        types = runtime.tensor_types(model, unknown)
    except ModelError:
        # Tensors that are not told stay float; who runs the model says what is wrong with it.
        return inferred
    inferred.graph.value_info.extend(helper.make_tensor_value_info(n, *types[n]) for n in unknown if n in types)
    return onnx.shape_inference.infer_shapes(inferred, data_prop=True)
