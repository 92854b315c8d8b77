"""Conversion between opsets: onnx's version converter, and rewrites of what it does not convert correctly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, inliner

from eptq_onnx.errors import ModelError, one_line
from eptq_onnx.graph import edit
from eptq_onnx.graph.fold import fold_constants
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.view import GraphView, attribute, int_attribute, opset_of
from eptq_onnx.proto import weights
from eptq_onnx.proto.bodies import all_nodes, subgraphs


def within(model: ModelProto, least: int, newest: int, newest_ir: int) -> ModelProto:
    """Return a model in an opset and IR version that both target and runtime read; itself if it has them.

    Parameters
    ----------
    model : ModelProto
        Without functions.
    least : int
        Lowest default-domain opset that the target allows.
    newest, newest_ir : int
        Highest default-domain opset and IR version of quantized models that the runtime reads.

    Raises
    ------
    ModelError
        If an operator cannot be converted.
    """
    current, newest = opset_of(model), max(newest, least)
    if current < least:
        model = _upgraded(fold_constants(model), least)
    elif current > newest:
        model = converted(_expanded(model, newest), newest)
    if model.ir_version > newest_ir:
        model = edit.with_nodes(model, model.graph.node)
        model.ir_version = newest_ir
    return model


def restored(model: ModelProto, opset: int, ir_version: int, newest: int, newest_ir: int) -> ModelProto:
    """Return a model in at least this opset and IR version; itself if it has them.

    The IR version is not raised beyond what the runtime reads, unless the opset is newer, too: the model
    needs no feature of the newer version.

    Parameters
    ----------
    model : ModelProto
    opset, ir_version : int
    newest, newest_ir : int
        Highest default-domain opset and IR version of quantized models that the runtime reads.

    Raises
    ------
    ModelError
        If an operator cannot be converted.
    """
    if opset_of(model) < opset:
        model = converted(model, opset)
    if opset_of(model) <= newest:
        ir_version = min(ir_version, newest_ir)
    if model.ir_version < ir_version:
        model = edit.with_nodes(model, model.graph.node)
        model.ir_version = ir_version
    return model


def converted(model: ModelProto, opset: int) -> ModelProto:
    """Return a copy in another default-domain opset, made by onnx's version converter.

    Raises
    ------
    ModelError
        If an operator cannot be converted.
    """
    light, heavy = weights.light(model)
    try:
        # Some of the converter's adapters need the ranks of tensors.
        light = onnx.version_converter.convert_version(
            onnx.shape_inference.infer_shapes(light, data_prop=True), opset
        )
    except Exception as e:
        # The converter raises bare C++ exceptions of several kinds.
        raise ModelError(
            f"the model's opset {opset_of(model)} cannot be converted to {opset}, "
            f"which the target or the runtime needs: {one_line(e)}"
        ) from e
    result = weights.without_weights(model)
    result.ir_version = light.ir_version
    del result.graph.node[:], result.graph.value_info[:]
    result.graph.node.extend(light.graph.node)
    result.graph.initializer.extend([*light.graph.initializer, *heavy])
    others = [o for o in result.opset_import if o.domain not in ("", "ai.onnx")]
    del result.opset_import[:]
    result.opset_import.extend([helper.make_opsetid("", opset), *others])
    return result


# ---- up: operators that the converter rejects, or converts to a different meaning --------------------------
def _upgraded(model: ModelProto, opset: int) -> ModelProto:
    """Return an equivalent copy in a higher opset."""
    view, builder = GraphView(model), edit.Builder(model)
    for node in view.nodes:
        _refuse_old_forms_inside(node, opset_of(model))
        rule = _OLD_FORMS.get(node.op_type)
        if rule is None or not rule(node, view, builder):
            builder.nodes.append(node)
    modes = {n.output[0]: mode for n in view.nodes if (mode := _resize_modes(n, view, opset_of(model)))}
    result = converted(edit.with_nodes(model, builder.nodes, builder.initializers), opset)
    for node in result.graph.node:
        for name, value in modes.get(node.output[0], {}).items():
            kept = [a for a in node.attribute if a.name != name]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute(name, value)])
    return result


def _refuse_old_forms_inside(node: NodeProto, opset: int) -> None:
    """Raise if a subgraph of a node has operators whose meaning the converter changes."""
    for inner in (n for graph in subgraphs(node) for n in all_nodes(graph)):
        changed = inner.op_type in ("Upsample", *_OLD_FORMS) or (
            inner.op_type == "Resize" and opset < _RESIZE_WITH_MODES
        )
        if changed and not (inner.op_type == "BatchNormalization" and int_attribute(inner, "spatial", 1)):
            raise ModelError(
                f"{inner.name or inner.output[0]}, a {inner.op_type} of opset {opset} inside "
                f"{node.name or node.output[0]}, has no equal in later opsets there: "
                "export the model with opset 13 or later."
            )


def _resize_modes(node: NodeProto, view: GraphView, opset: int) -> dict[str, str]:
    """Return the attributes of a later Resize that samples like an Upsample or a Resize of opset 10.

    The defaults of later Resizes differ. Source: onnxruntime 1.19, upsamplebase.h: asymmetric coordinates;
    the nearest sample is that below if an axis grows, and that above if it shrinks.
    """
    if node.op_type != "Upsample" and (node.op_type != "Resize" or opset >= _RESIZE_WITH_MODES):
        return {}
    modes = {"coordinate_transformation_mode": "asymmetric"}
    if attribute(node, "mode", "nearest") != "nearest":
        return modes
    scales = attribute(node, "scales")
    if scales is None and view.is_constant(node.input[1]):
        scales = view.constant(node.input[1])
    if node.op_type == "Upsample" or (scales is not None and np.min(scales) >= 1):  # type: ignore[call-overload]
        return {**modes, "nearest_mode": "floor"}
    if scales is not None and np.max(scales) <= 1:  # type: ignore[call-overload]
        return {**modes, "nearest_mode": "ceil"}
    raise ModelError(
        f"{node.name or node.output[0]}, a Resize of opset 10, may grow and shrink: "
        "no later Resize does the same; export the model with opset 11 or later."
    )


def _places_as_arithmetic(node: NodeProto, view: GraphView, b: edit.Builder) -> bool:
    """BatchNormalization with statistics per position (``spatial = 0``, early opsets) → Mul, Add."""
    if (
        int_attribute(node, "spatial", 1)
        or len(node.output) > 1
        or not all(view.is_constant(i) for i in node.input[1:])
    ):
        return False
    scale, offset, mean, var = (view.constant(i).astype(np.float64) for i in node.input[1:5])
    a = scale / np.sqrt(var + float(attribute(node, "epsilon", 1e-5)))  # type: ignore[arg-type]
    scaled = b.add("Mul", [node.input[0], b.constant(a.astype(np.float32), "scale")])
    b.add("Add", [scaled, b.constant((offset - mean * a).astype(np.float32), "offset")], node.output[0])
    return True


def _flatten_hardmax(node: NodeProto, view: GraphView, b: edit.Builder) -> bool:
    """Hardmax up to opset 12, which merges all axes from ``axis`` on → Flatten, Hardmax, Reshape."""
    shape = b.add("Shape", [node.input[0]])
    rows = b.add("Flatten", [node.input[0]], axis=int_attribute(node, "axis", 1))
    b.add("Reshape", [b.add("Hardmax", [rows], axis=1), shape], node.output[0])
    return True


_RESIZE_WITH_MODES = 11
_OLD_FORMS: dict[str, Callable[[NodeProto, GraphView, edit.Builder], bool]] = {
    "BatchNormalization": _places_as_arithmetic,
    "Hardmax": _flatten_hardmax,
}


# ---- down: operators that older opsets do not have ---------------------------------------------------------
def _expanded(model: ModelProto, newest: int) -> ModelProto:
    """Return a copy in which operators introduced after opset ``newest`` are replaced by their definition."""
    opset = opset_of(model)
    view = GraphView(infer_shapes(model))
    young = [n for n in view.nodes if n.domain in ("", "ai.onnx") and _is_younger(n, opset, newest)]
    if not young:
        return model
    result = edit.with_nodes(model, view.nodes)
    types = {v.name: v.type for v in (*view.model.graph.value_info, *view.model.graph.input)}
    types |= {
        t.name: helper.make_tensor_type_proto(t.data_type, list(t.dims)) for t in model.graph.initializer
    }
    wanted = {n.output[0]: k for k, n in enumerate(young)}
    for node in result.graph.node:
        if node.output[0] not in wanted:
            continue
        body = _definition(node, opset, [types.get(i, onnx.TypeProto()) for i in node.input])
        body.domain, body.name = "eptq_onnx", f"{node.op_type}_{wanted[node.output[0]]}"
        node.domain, node.op_type = body.domain, body.name
        result.functions.append(body)
    edit.import_domain(result, "eptq_onnx")
    return inliner.inline_local_functions(result)


_CHANGED = {"GroupNormalization"}
"""Operators whose meaning changed in some opset, and which the converter cannot convert back."""


def _is_younger(node: NodeProto, opset: int, newest: int) -> bool:
    """Return True if an operator, or its present meaning, was introduced after an opset."""
    if node.op_type in _CHANGED:
        return int(onnx.defs.get_schema(node.op_type, opset, "").since_version) > newest
    return _first_version(node, opset) > newest


def _first_version(node: NodeProto, opset: int) -> int:
    """Return the opset that introduced an operator."""
    version = int(onnx.defs.get_schema(node.op_type, opset, "").since_version)
    while version > 1 and onnx.defs.has(node.op_type, version - 1, ""):
        version = int(onnx.defs.get_schema(node.op_type, version - 1, "").since_version)
    return version


def _definition(node: NodeProto, opset: int, types: list[onnx.TypeProto]) -> onnx.FunctionProto:
    schema: Any = onnx.defs.get_schema(node.op_type, opset, "")  # its stubs lack the functions
    body = onnx.FunctionProto()
    if schema.has_function:
        body.CopyFrom(schema.function_body)
    elif schema.has_context_dependent_function:
        body.ParseFromString(
            schema.get_context_dependent_function(
                node.SerializeToString(), [t.SerializeToString() for t in types]
            )
        )
    else:
        raise ModelError(
            f"{node.name or node.output[0]} is a {node.op_type} of opset {opset}, which the installed "
            "onnxruntime does not read and ONNX does not define by simpler operators: "
            "install a newer onnxruntime."
        )
    return body
