"""Write products of dynamically quantized activations in the form that runtimes fuse.

The passes work on quantizers, between which a product keeps its operator and its name; the file holds the
integer operators:

    MatMul(D(DynamicQuantizeLinear(X)), D(W)), Gemm(D(DynamicQuantizeLinear(X)), D(W), bias)
    →  Mul(Cast(MatMulInteger(x, W, zero)), Mul(scale, scales of W)) [+ bias]

with D = DequantizeLinear and x, scale, zero of one DynamicQuantizeLinear, which all products of X share.
onnxruntime (1.18 to 1.32) makes a DynamicQuantizeMatMul of the nodes of a product, or a MatMulIntegerToFloat
if several share x, the Add of a bias included. It also makes these kernels of the quantizers themselves, but
then adds the bias in a node of its own, and has no such kernel for a Gemm.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from eptq_onnx.graph import edit
from eptq_onnx.graph.view import GraphView, attribute, int_attribute

PRODUCTS = ("Gemm", "MatMul")
"""Operators that MatMulInteger computes, if a constant is their second operand."""


def dynamic_objection(node: NodeProto, view: GraphView) -> str | None:
    """Return why MatMulInteger does not compute a layer that is a product, or None."""
    if len(view.constant_shape(node.input[1])) != 2:
        return "its weight is a stack of matrices"
    shape = view.shape(node.input[0])
    return "its input is a vector" if shape is not None and len(shape) < 2 else None


def integer_products(model: ModelProto) -> ModelProto:
    """Return a copy in which integer operators compute the products of dynamically quantized activations.

    Parameters
    ----------
    model : ModelProto
        It is not changed, and returned as it is if there are none.
    """
    view, builder = GraphView(model), edit.Builder(model)
    if not any(n.op_type == "DynamicQuantizeLinear" for n in view.nodes):
        return model
    for node in view.nodes:
        quantize, weight = _quantized(node, view)
        if quantize is None or weight is None:
            builder.nodes.append(node)
        else:
            builder.nodes.extend(_product(node, quantize, weight, view, builder))
    result = edit.with_nodes(model, builder.nodes, builder.initializers)
    edit.prune(result)
    return result


def parts_of_products(view: GraphView) -> set[str]:
    """Return the nodes of integer products in a file, which runtimes fuse, and whose sums are large."""
    found: set[str] = set()
    inside: set[str] = set()
    for node in view.nodes:
        varying = [i for i in node.input if i and not view.is_constant(i)]
        starts = node.op_type in ("DynamicQuantizeLinear", "MatMulInteger")
        if starts or (node.op_type in ("Cast", "Mul") and inside.issuperset(varying)):
            found.add(node.name)
            # A Mul of two such tensors is the product itself.
            inside.update(node.output if starts or len(varying) == 1 else ())
    return found


def _quantized(node: NodeProto, view: GraphView) -> tuple[NodeProto | None, NodeProto | None]:
    """Return the DynamicQuantizeLinear of a product's input, and the DequantizeLinear of its weight."""
    if node.op_type not in PRODUCTS:
        return None, None
    data, weight = (
        maker if maker is not None and maker.op_type == "DequantizeLinear" else None
        for maker in map(view.producer.get, node.input[:2])
    )
    if data is None or weight is None or not view.is_constant(weight.input[0]):
        return None, None
    quantize = view.producer.get(data.input[0])
    dynamic = quantize is not None and quantize.op_type == "DynamicQuantizeLinear"
    return (quantize, weight) if dynamic else (None, None)


def _product(
    node: NodeProto, quantize: NodeProto, weight: NodeProto, view: GraphView, b: edit.Builder
) -> list[NodeProto]:
    """Return the nodes of a product; the last one has its name and its result."""
    x, scale, zero = quantize.output
    stored, scales = weight.input[0], view.constant(weight.input[1])
    if int_attribute(node, "transB", 0):
        turned = b.unique(f"{stored}_transposed")
        b.keep(np.ascontiguousarray(view.constant(stored).T), turned)
        stored = turned
    alpha = np.float32(attribute(node, "alpha", 1.0))  # type: ignore[arg-type]
    factors = b.constant(np.asarray(scales * alpha, np.float32), f"{stored}_scale")
    stem, result = node.name or node.output[0], node.output[0]
    bias = node.input[2] if len(node.input) > 2 else ""
    names = [b.unique(f"{stem}/{step}") for step in ("integers", "floats", "scales", "product")]
    integers, floats, both, product = names

    def made(op_type: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
        name = node.name if output == result else b.unique(f"{output}/{op_type}")
        return helper.make_node(op_type, inputs, [output], name=name, **attributes)

    nodes = [
        made("MatMulInteger", [x, stored, zero], integers),
        made("Cast", [integers], floats, to=TensorProto.FLOAT),
        made("Mul", [scale, factors], both),
        made("Mul", [floats, both], product if bias else result),
    ]
    return [*nodes, made("Add", [product, bias], result)] if bias else nodes
