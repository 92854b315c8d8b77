"""Detection of damaged models before anything else reads them, and repair of damage that onnxruntime ignores.

Some damage crashes libraries: onnxruntime 1.19 ends the process on a Conv whose weight lacks an axis, or
whose strides are 0. A model that onnx's strict inference rejects is therefore tried in another process first.
"""

from __future__ import annotations

import onnx
from onnx import ModelProto

from eptq_onnx import probes, runtime
from eptq_onnx.crashes import survives
from eptq_onnx.errors import ModelError, one_line
from eptq_onnx.graph.canonical import FIRST_IR_WITH_CONSTANTS
from eptq_onnx.graph.view import opset_of
from eptq_onnx.proto.bodies import all_graphs, all_nodes
from eptq_onnx.proto.weights import light


def make_sound(model: ModelProto, name: str) -> None:
    """Reject a model that onnxruntime does not load, and remove, in place, what only other libraries reject.

    Parameters
    ----------
    model : ModelProto
    name : str
        Name of the model in messages.

    Raises
    ------
    ModelError
        If onnxruntime reads models of this opset and IR version, but refuses this one, or crashes on it.
    """
    # Old exporters omit the IR version; their files may otherwise be valid.
    model.ir_version = model.ir_version or FIRST_IR_WITH_CONSTANTS
    for node in all_nodes(model.graph):
        for attribute in node.attribute:
            # Attribute references have a meaning inside functions only.
            attribute.ClearField("ref_attr_name")
    if _objection(model) is not None:
        bare = _without_shapes(light(model)[0])
        if _objection(bare) is None:
            _without_shapes(model)
        if not survives(_of_readable_opset(model)):
            why = _objection(model) or _objection(bare)
            raise ModelError(
                f"{name} is not valid ONNX, and onnxruntime crashes on it, "
                f"or has not loaded it after a minute: {why}"
            )
    opset, ir_version = probes.newest_readable()
    if opset_of(model) > opset or model.ir_version > ir_version:
        return
    try:
        runtime.Session(model, optimize=False)
    except ModelError as e:
        # Types without a kernel are widened later.
        if runtime.NO_KERNEL not in str(e):
            raise ModelError(f"{name}: {e}") from e


def _objection(model: ModelProto) -> str | None:
    """Return the error of onnx's strict inference on a model, or None.

    Inference stops at unknown operators, and would miss what is wrong behind them.
    """
    opset = opset_of(model)
    for node in all_nodes(model.graph):
        if not node.domain and not onnx.defs.has(node.op_type, opset):
            return f"opset {opset} has no operator {node.op_type}"
    try:
        onnx.shape_inference.infer_shapes(light(model)[0], check_type=True, strict_mode=True)
    except Exception as e:
        # onnx raises bare C++ exceptions of several kinds.
        return one_line(e)
    return None


def _of_readable_opset(model: ModelProto) -> ModelProto:
    """Return the model with numbers of opset and IR that onnxruntime reads.

    It looks no further at a model with newer ones, but would crash on it after conversion.
    """
    opset, ir_version = probes.newest_readable()
    if opset_of(model) <= opset and model.ir_version <= ir_version:
        return model
    readable = ModelProto()
    readable.CopyFrom(model)
    readable.ir_version = min(model.ir_version, ir_version)
    for imported in readable.opset_import:
        if imported.domain in ("", "ai.onnx"):
            imported.version = min(imported.version, opset)
    return readable


def _without_shapes(model: ModelProto) -> ModelProto:
    """Remove the declared shapes of computed tensors, in place, and return the model.

    Shapes without axes stay: Loop requires scalars.
    """
    for graph in all_graphs(model.graph):
        inputs = () if graph is model.graph else graph.input
        for tensor in (
            i.type.tensor_type
            for i in (*graph.output, *graph.value_info, *inputs)
            if i.type.HasField("tensor_type")
        ):
            if len(tensor.shape.dim):
                tensor.ClearField("shape")
    return model
