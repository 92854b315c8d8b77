"""The bytes of the parts of a quantized model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from onnx import ModelProto, NodeProto, TensorProto

from eptq_onnx.graph import blocks
from eptq_onnx.graph.view import QUANTIZERS, GraphView
from eptq_onnx.proto import store
from eptq_onnx.proto.bodies import all_nodes, initializers

PARTS = ("weights", "scales and zero points", "biases", "float constants", "graph")
_BIASED = ("Conv", "ConvTranspose", "Gemm")
"""Operators whose third input is a bias."""
_FLOAT = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_WHOLE = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
"""Types of shapes, axes and conditions."""


def size_of_parts(model: ModelProto) -> dict[str, int]:
    """Return the bytes of each of `PARTS`; together they are the model's.

    Weights are the integers that DequantizeLinear, or the Cast of a float layer's weight, reads, with the
    constants that unpack them, and stored tables. Constants in floating point include float weights. The
    graph is the rest: nodes, names, shapes.
    """
    nodes = list(all_nodes(model.graph))
    producers = {o: n for n in nodes for o in n.output}
    constants = {t.name: t for t in initializers(model.graph)}
    scales = _scales(nodes, constants)
    part = dict.fromkeys(blocks.scales(GraphView(model)), "scales and zero points")
    for node in nodes:
        if node.op_type in QUANTIZERS or node.output[0] in scales:
            part.update(dict.fromkeys(scales.get(node.output[0], node.input[1:]), "scales and zero points"))
            waiting = [] if node.op_type == "QuantizeLinear" else list(node.input[:1])
            while waiting:
                name = waiting.pop()
                if name in constants:
                    is_bias = name == node.input[0] and constants[name].data_type == TensorProto.INT32
                    part.setdefault(name, "biases" if is_bias else "weights")
                elif name in producers and producers[name].op_type not in (*QUANTIZERS, "Clip"):
                    waiting.extend(producers[name].input)
        elif node.op_type == "MatMulNBits":
            part.update(
                {name: "scales and zero points" for name in node.input[2:]} | {node.input[1]: "weights"}
            )
        elif node.op_type in _BIASED:
            part.update(dict.fromkeys(node.input[2:3], "biases"))
    sizes = Counter(dict.fromkeys(PARTS, 0))
    for name, tensor in constants.items():
        kind = "float constants" if tensor.data_type in _FLOAT else "weights"
        rest = "graph" if tensor.data_type in _WHOLE else kind
        sizes[part.get(name, rest)] += store.value_bytes(tensor)
    sizes["graph"] += store.model_bytes(model) - sum(sizes.values())
    return dict(sizes)


def _scales(nodes: Iterable[NodeProto], constants: Collection[str]) -> dict[str, list[str]]:
    """Return the scales of weights of float layers, by the result of the Cast of their integers."""
    fixed, casts, found = set(constants), set[str](), dict[str, list[str]]()
    for node in nodes:
        if node.input and node.op_type not in QUANTIZERS and fixed.issuperset(filter(None, node.input)):
            fixed.update(node.output)
            casts.update(node.output if node.op_type == "Cast" else ())
        if node.op_type == "Mul" and fixed.issuperset(node.input):
            own = [i for i in node.input if i in casts]
            found.update({name: [i for i in node.input if i in constants] for name in own})
    return found
