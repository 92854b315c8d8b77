"""Find what runtimes would compute on integers unasked.

Newer versions (1.32) quantize the weight of a float Conv, ConvTranspose or Gemm that lies between a
DequantizeLinear and a QuantizeLinear, with one scale for the whole tensor (the optimizer
WeightBiasQuantization). Relu and Clip in front of the QuantizeLinear do not count. A MatMul with an Add
behind it becomes a Gemm before that. So it is for onnxruntime.

OpenVINO moves a DequantizeLinear behind an AveragePool, whatever the plan says, and then pads with the
integer 0.
"""

from __future__ import annotations

from onnx import NodeProto

from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.plan.draft import Draft
from eptq_onnx.ops.sizes import SIZES
from eptq_onnx.records import ActivationQuantizer

_QUANTIZED_UNASKED = ("Conv", "ConvTranspose", "Gemm")
_SKIPPED = ("Relu", "Clip")


def guarded_tensors(draft: Draft, activations: tuple[ActivationQuantizer, ...]) -> frozenset[str]:
    """Return the results of float layers that the runtime would quantize."""
    view = draft.view
    quantized = {t for q in activations for t in q.tensors}
    found = set()
    for node in view.nodes:
        if node.name in draft.quantized or not draft.is_weighted(node) or node.input[0] not in quantized:
            continue
        end = _as_gemm(node, view) if node.op_type == "MatMul" else node
        if end is not None and end.op_type in (*_QUANTIZED_UNASKED, "Add") and _leads(end, view, quantized):
            found.add(end.output[0])
    return frozenset(found)


def shielded_nodes(draft: Draft) -> frozenset[str]:
    """Return the float nodes that the target would compute on integers, which it must not."""
    found = set()
    for node in draft.view.nodes:
        most, pads = draft.row(node).most.get("counted_pads"), SIZES["counted_pads"](node, draft.view)
        if node.name not in draft.quantized and most is not None and pads is not None and pads > most:
            found.add(node.name)
    return frozenset(found)


def _as_gemm(node: NodeProto, view: GraphView) -> NodeProto | None:
    """Return the sum that the runtime joins with a MatMul into a Gemm, or None."""
    readers = view.consumers[node.output[0]]
    if len(readers) != 1 or readers[0].op_type != "Add" or node.output[0] in view.outputs:
        return None
    return readers[0] if any(map(view.is_constant, readers[0].input)) else None


def _leads(node: NodeProto, view: GraphView, quantized: set[str]) -> bool:
    """Return True if nothing but functions that the runtime skips lies between a node and a quantizer."""
    tensor = node.output[0]
    while tensor not in quantized:
        readers = view.consumers[tensor]
        if len(readers) != 1 or readers[0].op_type not in _SKIPPED or readers[0].input[0] != tensor:
            return False
        tensor = readers[0].output[0]
    return True
