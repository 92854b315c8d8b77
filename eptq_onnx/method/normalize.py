"""Bring a model into the normal form that all other steps expect.

Functions are inlined, the opset is raised if the target needs it, all floats become float32, constants are
folded into initializers, nodes are named, BatchNormalization and padding are folded into the layers they
belong to, every layer has a bias of its own, and the branches that all samples take are hoisted into the main
graph. Inputs and outputs keep their names, and so does every tensor that is still computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, inliner

from eptq_onnx.data.samples import Samples
from eptq_onnx.graph import branches, edit, fold, opsets
from eptq_onnx.graph.canonical import FIRST_IR_WITH_CONSTANTS, separate_names
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.shapes import with_ranks
from eptq_onnx.graph.view import GraphView, attribute, int_attribute, ints_attribute
from eptq_onnx.graph.widen import widen
from eptq_onnx.ops import output_channels
from eptq_onnx.probes import newest_readable
from eptq_onnx.runtime import Session

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_WITH_BIAS = (*_CONVOLUTIONS, "Gemm")


def normalize(model: ModelProto, min_opset: int, samples: Samples | None = None) -> ModelProto:
    """Return the model in normal form; the argument is not changed.

    Parameters
    ----------
    model : ModelProto
    min_opset : int
        A lower opset is raised to this; one that the installed onnxruntime cannot read is lowered.
    samples : Samples, optional
        If given, an If whose condition is the same for all of them is resolved; see
        `eptq_onnx.graph.branches`.

    Raises
    ------
    ModelError
        If the model cannot be converted or folded.
    """
    result = _inlined(model) if model.functions else _copy(model)
    _drop_default_inputs(result)
    result = _rewritten(widen(opsets.within(result, min_opset, *newest_readable())))
    return infer_shapes(result) if samples is None else settle(result, samples)


def settle(model: ModelProto, samples: Samples) -> ModelProto:
    """Hoist the branches that all samples take, and add the ranks that running the model shows.

    Parameters
    ----------
    model : ModelProto
        In normal form.
    samples : Samples
    """
    result = infer_shapes(_settled(model, samples))
    # More is known behind an If about the branch that samples take than about both.
    known = with_ranks(branches.flattened(result), samples.two_batches(samples.micro_batch(1))[0])
    if known is not result:
        del result.graph.value_info[:]
        result.graph.value_info.extend(known.graph.value_info)
    return result


def _inlined(model: ModelProto) -> ModelProto:
    result = inliner.inline_local_functions(model)
    separate_names(result)
    return result


def _rewritten(model: ModelProto) -> ModelProto:
    _spell_out_axes(model)
    result = fold.fold_constants(model)
    name_nodes(result)
    for rewrite in (_as_matrix_products, _fold_bias, _fold_batch_normalization, _fold_padding, _own_bias):
        result = rewrite(result)
    return result


def _settled(model: ModelProto, samples: Samples) -> ModelProto:
    """Hoist the branches that all samples take, including nested ones."""
    decided: dict[str, bool] = {}
    stays = {n.name for n in model.graph.node}
    while found := _decided(model, samples, decided):
        decided.update(found)
        model = branches.with_constants_outside(_rewritten(branches.hoist(model, found)), decided)
    if decided:
        branches.mark(model, decided, stays)
    return model


def _decided(model: ModelProto, samples: Samples, known: Mapping[str, bool]) -> dict[str, bool]:
    """Return the new Ifs whose condition is the same for all samples, with that condition."""
    conditions = {node: tensor for node, tensor in branches.conditions(model).items() if node not in known}
    if not conditions:
        return {}
    probe = _copy(model)
    edit.set_outputs(probe, list(dict.fromkeys(conditions.values())), TensorProto.BOOL)
    edit.prune(probe)
    session = Session(probe)
    seen: dict[str, set[bool]] = {tensor: set() for tensor in conditions.values()}
    for part in samples.batches(range(samples.count), samples.micro_batch()):
        feeds = samples.take(part)
        for tensor, value in session.run(session.taken(feeds)).items():
            seen[tensor].update(bool(v) for v in value.reshape(-1))
    return {node: next(iter(seen[tensor])) for node, tensor in conditions.items() if len(seen[tensor]) == 1}


def _copy(model: ModelProto) -> ModelProto:
    result = ModelProto()
    result.CopyFrom(model)
    return result


def _drop_default_inputs(model: ModelProto) -> None:
    """Turn initializers listed as inputs (IR 3 style) into constants."""
    model.ir_version = max(model.ir_version, FIRST_IR_WITH_CONSTANTS)
    constants = {t.name for t in model.graph.initializer}
    inputs = [i for i in model.graph.input if i.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)


def _spell_out_axes(model: ModelProto) -> None:
    """Write out default axes that onnx's checker does not infer."""
    for node in model.graph.node:
        if node.op_type == "MeanVarianceNormalization" and not node.attribute:
            node.attribute.append(helper.make_attribute("axes", [0, 2, 3]))


def name_nodes(model: ModelProto) -> None:
    """Give every node a unique name; the first node with a given name keeps it."""
    taken = {node.name for node in model.graph.node}
    seen: set[str] = set()
    for k, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{k}"
            while node.name in taken:
                node.name += "_"
            taken.add(node.name)
        seen.add(node.name)


def _rewrite(
    model: ModelProto, visit: Callable[[NodeProto, GraphView, edit.Builder], NodeProto | None]
) -> ModelProto:
    """Offer every node to ``visit``; a returned node replaces the node and the only producer of its data."""
    changed = True
    while changed:
        changed = False
        view, builder = GraphView(model), edit.Builder(model)
        replaced: set[int] = set()
        nodes: dict[int, NodeProto] = {id(n): n for n in view.nodes}
        for node in view.nodes:
            if id(node) in replaced:
                continue
            merged = visit(node, view, builder)
            if merged is not None:
                producer = next(view.producer[i] for i in node.input if i in view.producer)
                if id(producer) in replaced:
                    continue
                replaced.update((id(node), id(producer)))
                nodes[id(node)] = merged
                del nodes[id(producer)]
                changed = True
        if changed:
            model = edit.with_nodes(model, [*builder.nodes, *nodes.values()], builder.initializers)
            edit.prune(model)
    return model


def _sole_reader(view: GraphView, tensor: str) -> bool:
    return len(view.consumers[tensor]) == 1 and tensor not in view.outputs


def _fold_batch_normalization(model: ModelProto) -> ModelProto:
    """Fold BatchNormalization: y = a (W x + b) + c → a layer with weight a W and bias a b + c.

    Here a = scale / sqrt(var + eps) and c = B - mean a, both per output channel. W has its output channels on
    axis 0 (Conv; Gemm with transB), axis 1 (Gemm), or on (group, axis 1) of shape (C_in, C_out / group, ...)
    (ConvTranspose).
    """
    return _rewrite(model, _visit_batch_normalization)


def _visit_batch_normalization(node: NodeProto, view: GraphView, b: edit.Builder) -> NodeProto | None:
    if node.op_type != "BatchNormalization" or int_attribute(node, "training_mode", 0):
        return None
    layer = view.producer.get(node.input[0])
    if layer is None or layer.op_type not in _WITH_BIAS or not _sole_reader(view, node.input[0]):
        return None
    constants = [*node.input[1:5], *[i for i in layer.input[1:] if i]]
    if not all(view.is_constant(i) and view.is_float(i) for i in constants):
        return None
    if layer.op_type == "Gemm" and float(attribute(layer, "beta", 1.0)) != 1.0:  # type: ignore[arg-type]
        return None
    channels = _output_channels(layer, view.constant_shape(layer.input[1]))
    has_bias = len(layer.input) > 2 and bool(layer.input[2])
    # If shapes do not match, onnxruntime reports it when it runs the model.
    if any(view.constant_shape(i) != (channels,) for i in node.input[1:5]):
        return None
    if has_bias and math.prod(view.constant_shape(layer.input[2])) not in (1, channels):
        return None
    scale, offset, mean, var = (view.constant(i).astype(np.float64) for i in node.input[1:5])
    a = scale / np.sqrt(var + float(attribute(node, "epsilon", 1e-5)))  # type: ignore[arg-type]
    weight = view.constant(layer.input[1]).astype(np.float64)
    bias = view.constant(layer.input[2]).astype(np.float64).reshape(-1) if has_bias else np.zeros(1)
    merged = NodeProto()
    merged.CopyFrom(layer)
    merged.output[0] = node.output[0]
    stem = layer.input[1]
    del merged.input[1:]
    merged.input.append(_constant(b, _scale_outputs(layer, weight, a), f"{stem}_bn"))
    merged.input.append(_constant(b, a * bias + offset - mean * a, f"{stem}_bn_bias"))
    return merged


def _output_channels(layer: NodeProto, weight: tuple[int, ...]) -> int | None:
    """Return the output channels of a weight of this shape, or None if the shape does not fit."""
    matrix = layer.op_type == "Gemm"
    if len(weight) < 2 or (matrix and len(weight) != 2):
        return None
    if layer.op_type == "ConvTranspose":
        group = int_attribute(layer, "group", 1)
        return weight[1] * group if group > 0 and weight[0] % group == 0 else None
    return weight[1] if matrix and not int_attribute(layer, "transB", 0) else weight[0]


def _scale_outputs(
    layer: NodeProto, weight: NDArray[np.float64], a: NDArray[np.float64]
) -> NDArray[np.float64]:
    if layer.op_type == "ConvTranspose":
        group = int_attribute(layer, "group", 1)
        split = weight.reshape(group, weight.shape[0] // group, weight.shape[1], -1)
        return (split * a.reshape(group, 1, -1, 1)).reshape(weight.shape)
    if layer.op_type == "Gemm" and not int_attribute(layer, "transB", 0):
        return weight * a
    return weight * a.reshape([-1] + [1] * (weight.ndim - 1))


def _constant(b: edit.Builder, value: NDArray[np.float64], stem: str) -> str:
    return b.constant(value.astype(np.float32), stem)


def _fold_bias(model: ModelProto) -> ModelProto:
    """Fold the bias of a product of matrices: x W + b → one Gemm.

    Runtimes add the bias of a Gemm to the products before they are rounded.
    """
    products = {n.output[0] for n in model.graph.node if n.op_type == "MatMul"}
    if not any(n.op_type == "Add" and products.intersection(n.input) for n in model.graph.node):
        return model
    return _rewrite(infer_shapes(model), _visit_bias)


def _visit_bias(node: NodeProto, view: GraphView, b: edit.Builder) -> NodeProto | None:
    if node.op_type != "Add":
        return None
    for product, bias in (node.input, reversed(node.input)):
        layer = view.producer.get(product)
        if (
            layer is None
            or layer.op_type != "MatMul"
            or not _sole_reader(view, product)
            or not view.is_constant(bias)
        ):
            continue
        if (
            not view.is_constant(layer.input[1])
            or view.is_constant(layer.input[0])
            or not view.is_float(bias)
        ):
            continue
        shapes = [view.shape(layer.input[0]), view.shape(layer.input[1]), view.shape(bias)]
        if any(s is None for s in shapes) or [len(s or ()) for s in shapes[:2]] != [2, 2]:
            continue
        columns = view.constant_shape(layer.input[1])[1]
        value = view.constant(bias)
        if (
            value.size not in (1, columns)
            or value.ndim > 2
            or (value.ndim == 2 and value.shape[0] != 1)
            or not np.isfinite(value).all()
        ):
            continue
        name = b.constant(
            np.ascontiguousarray(np.broadcast_to(value.reshape(-1), columns)), f"{node.name}_bias"
        )
        return helper.make_node("Gemm", [*layer.input, name], list(node.output), name=layer.name)
    return None


def _as_matrix_products(model: ModelProto) -> ModelProto:
    """Rewrite products with a constant as a MatMul with a constant right operand."""
    constants = {t.name for t in model.graph.initializer}
    if not any(
        n.op_type == "Einsum" or (n.op_type == "MatMul" and n.input[0] in constants) for n in model.graph.node
    ):
        return model
    view, builder = GraphView(infer_shapes(model)), edit.Builder(model)
    for node in view.nodes:
        if not (_turn_left_constant(node, view, builder) or _einsum_as_matrix_product(node, view, builder)):
            builder.nodes.append(node)
    result = edit.with_nodes(model, builder.nodes, builder.initializers)
    edit.prune(result)
    return result


def _turn_left_constant(node: NodeProto, view: GraphView, b: edit.Builder) -> bool:
    """Rewrite W X → (Xᵀ Wᵀ)ᵀ, with W constant and X of two or more axes."""
    if node.op_type != "MatMul" or not view.is_constant(node.input[0]) or view.is_constant(node.input[1]):
        return False
    weight, shape = view.constant(node.input[0]), view.shape(node.input[1])
    if weight.ndim != 2 or shape is None or len(shape) < 2 or not view.is_float(node.input[0]):
        return False
    swap = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    turned = b.add("Transpose", [node.input[1]], b.unique(f"{node.input[1]}_turned"), perm=swap)
    constant = b.constant(np.ascontiguousarray(weight.T), f"{node.input[0]}_turned")
    product = b.unique(f"{node.output[0]}_turned")
    b.nodes.append(helper.make_node("MatMul", [turned, constant], [product], name=node.name))
    b.add("Transpose", [product], node.output[0], perm=swap)
    return True


def _einsum_as_matrix_product(node: NodeProto, view: GraphView, b: edit.Builder) -> bool:
    """Rewrite an Einsum that sums over the last axes of x: "bsd,dhk->bshk" → x (W as a matrix), reshaped."""
    if (
        node.op_type != "Einsum"
        or len(node.input) != 2
        or [view.is_constant(i) for i in node.input] != [False, True]
    ):
        return False
    left, _, result = str(attribute(node, "equation")).replace(" ", "").partition("->")
    x, _, w = left.partition(",")
    summed = [c for c in x if c in w]
    kept, new = x[: len(x) - len(summed)], [c for c in w if c not in x]
    weight = view.constant(node.input[1])
    plain = "." not in left and result == kept + "".join(new) and x == kept + "".join(summed)
    if (
        not plain
        or not kept
        or not new
        or not summed
        or len(set(w)) != len(w)
        or len(set(x)) != len(x)
        or not view.is_float(node.input[1])
    ):
        return False
    order = weight.transpose([w.index(c) for c in (*summed, *new)])
    sizes = [weight.shape[w.index(c)] for c in new]
    matrix = np.ascontiguousarray(order.reshape(-1, int(np.prod(sizes))))
    source = node.input[0]
    if len(summed) > 1:
        source = b.add("Reshape", [source, b.constant(np.array([0] * len(kept) + [len(matrix)]), "shape")])
    flat = b.unique(f"{node.output[0]}_flat") if len(new) > 1 else node.output[0]
    b.nodes.append(
        helper.make_node(
            "MatMul", [source, b.constant(matrix, f"{node.input[1]}_matrix")], [flat], name=node.name
        )
    )
    if len(new) > 1:
        b.add("Reshape", [flat, b.constant(np.array([0] * len(kept) + sizes), "shape")], node.output[0])
    return True


def _fold_padding(model: ModelProto) -> ModelProto:
    """Fold Pad with zeros on spatial axes in front of a convolution → the convolution's own padding."""
    return _rewrite(model, _visit_padding)


def _visit_padding(node: NodeProto, view: GraphView, b: edit.Builder) -> NodeProto | None:
    pad = view.producer.get(node.input[0]) if node.input else None
    if node.op_type != "Conv" or pad is None or pad.op_type != "Pad" or not _sole_reader(view, node.input[0]):
        return None
    if attribute(pad, "mode", "constant") != "constant" or attribute(node, "auto_pad", "NOTSET") not in (
        "NOTSET",
        "VALID",
    ):
        return None
    extra = [i for i in pad.input[1:] if i]
    if not extra or not all(view.is_constant(i) for i in extra) or (len(pad.input) > 3 and pad.input[3]):
        return None
    if len(pad.input) > 2 and pad.input[2] and float(view.constant(pad.input[2]).reshape(-1)[0]) != 0:
        return None
    amounts = [int(v) for v in view.constant(pad.input[1])]
    rank = len(amounts) // 2
    if any(amounts[:2]) or any(amounts[rank : rank + 2]) or min(amounts) < 0:
        return None
    own = ints_attribute(node, "pads") or [0] * (2 * (rank - 2))
    pads = [p + q for p, q in zip([*amounts[2:rank], *amounts[rank + 2 :]], own, strict=True)]
    merged = NodeProto()
    merged.CopyFrom(node)
    merged.input[0] = pad.input[0]
    for item in list(merged.attribute):
        if item.name in ("pads", "auto_pad"):
            merged.attribute.remove(item)
    merged.attribute.append(helper.make_attribute("pads", pads))
    return merged


def _own_bias(model: ModelProto) -> ModelProto:
    """Give every layer with a constant bias a one-dimensional initializer that no other node reads."""
    view, builder = GraphView(model), edit.Builder(model)
    builder.nodes.extend(_with_own_bias(node, view, builder) for node in view.nodes)
    if not builder.initializers:
        return model
    result = edit.with_nodes(model, builder.nodes, builder.initializers)
    edit.prune(result)
    return result


def _with_own_bias(node: NodeProto, view: GraphView, builder: edit.Builder) -> NodeProto:
    if node.op_type not in _WITH_BIAS or len(node.input) < 3 or not view.is_constant(node.input[2]):
        return node
    value = view.constant(node.input[2])
    flat = value.reshape(-1)
    channels = output_channels(node, view) if view.is_constant(node.input[1]) else None
    if flat.size == 1 and channels is not None and channels > 1:
        flat = np.repeat(flat, channels)
    shared = len(view.consumers[node.input[2]]) > 1 or node.input[2] in view.outputs
    fits = channels is None or flat.size == channels
    if not fits or not (shared or value.ndim != 1 or flat.size != value.size):
        return node
    name = builder.unique(f"{node.name}_bias")
    builder.keep(np.ascontiguousarray(flat), name)
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.input[2] = name
    return copy
