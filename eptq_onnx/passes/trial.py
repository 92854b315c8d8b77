"""What files of a plan would take, for passes that choose what takes how many bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto, NodeProto

from eptq_onnx.config import Start
from eptq_onnx.graph.file_count import FileCount, Storing
from eptq_onnx.graph.message_sizes import field_bytes
from eptq_onnx.graph.packing import weights_of
from eptq_onnx.graph.view import QUANTIZERS, GraphView
from eptq_onnx.method.allocate import WIDTHS
from eptq_onnx.method.qdq import write
from eptq_onnx.method.ranges import weight_ranges
from eptq_onnx.method.signature import sign
from eptq_onnx.passes.base import Context, State
from eptq_onnx.records import Plan


@dataclass(frozen=True)
class Trial:
    """A file with weights rounded to nearest, in int8.

    Parameters
    ----------
    plan : Plan
    model : ModelProto
    stands_for : dict of str to str
        Quantized tensor to the tensor that holds its dequantized values.
    storing : Storing
        How weights will be stored, and which of them may need zero points.
    """

    plan: Plan
    model: ModelProto
    stands_for: Mapping[str, str]
    storing: Storing

    @property
    def names(self) -> dict[str, str]:
        """Return the name of each weight's integers."""
        return dict(zip(self.plan.weight_specs, weights_of(GraphView(self.model)), strict=False))

    @property
    def count(self) -> FileCount:
        """Return what counts the bytes of files with other widths."""
        return FileCount(self.model, self.names, self.storing)

    def of_quantizers(self) -> dict[str, int]:
        """Return the bytes of each activation quantizer: its nodes and constants."""
        view, found = GraphView(self.model), dict[str, int]()
        for quantizer in self.plan.activations:
            nodes: list[NodeProto] = []
            for tensor in quantizer.tensors:
                node = view.producer.get(self.stands_for.get(tensor, ""))
                while node is not None and node.op_type in (*QUANTIZERS, "Clip"):
                    nodes.append(node)
                    node = view.producer.get(node.input[0]) if node.op_type != "QuantizeLinear" else None
            found[quantizer.name] = _bytes_of(view, nodes)
        return found

    def in_float(self, exact: ModelProto) -> dict[str, int]:
        """Return the bytes by which a file is larger for each weight that stays float, less those in int8.

        Parameters
        ----------
        exact : ModelProto
            The float network.
        """
        view, floats, names = GraphView(self.model), GraphView(exact).initializers, self.names
        nodes = {node.name: node for node in view.nodes}
        found: dict[str, int] = {}
        for layer in self.plan.layers:
            makers = {i: view.producer[i] for i in nodes[layer.node].input if i in view.producer}
            around = _bytes_of(
                view,
                [
                    m
                    for m in makers.values()
                    if m.op_type == "DequantizeLinear" and view.is_constant(m.input[0])
                ],
                without=names[layer.weight],
            )
            own = [layer.weight] if layer.weight not in found else []
            if layer.bias is not None and layer.has_bias and self.plan.bias is not None:
                own.append(layer.bias)
            more = sum(field_bytes(int(floats[name].ByteSize())) for name in own)
            found[layer.weight] = found.get(layer.weight, 0) + more - around
        return found


def trial(state: State, ctx: Context, plan: Plan) -> Trial:
    """Return the trial file of a plan.

    Parameters
    ----------
    state : State
        Its calibration has a grid for every quantizer of the plan.
    ctx : Context
    plan : Plan
    """
    extremes = weight_ranges(state.executed, plan, state.calibration, state.scores, ctx.config, searched=())
    learned = ctx.config.optimizes or ctx.config.start is Start.CLOSED_FORM
    biases = {
        name: np.ones_like(values) if learned and not values.any() else values
        for name, values in extremes.biases.items()
    }
    written, stands_for = write(state.model, plan, replace(extremes, biases=biases))
    sign(written, ctx.given, ctx.target)
    return Trial(plan, written, stands_for, _storing(plan, ctx))


def _storing(plan: Plan, ctx: Context) -> Storing:
    """Return how weights are stored, and which of them may need zero points."""
    specs = {
        layer.weight: {
            bits: ctx.target.of(layer.op_type).weight_spec(bits, layer.weight_spec.axis, layer.depthwise)
            for bits in WIDTHS
        }
        for layer in plan.layers
    }
    return Storing(
        ctx.target.storage_for(ctx.config.storage),
        ctx.target.weight.storage,
        {name: {bits: not spec.symmetric for bits, spec in of.items()} for name, of in specs.items()},
    )


def _bytes_of(view: GraphView, nodes: Iterable[NodeProto], without: str = "") -> int:
    """Return the bytes of nodes and their constants, each counted once."""
    own = {n.name: n for n in nodes}.values()
    constants = {i for n in own for i in n.input if i != without and view.is_constant(i)}
    taken = sum(field_bytes(int(node.ByteSize())) for node in own)
    return taken + sum(field_bytes(int(view.initializers[name].ByteSize())) for name in constants)
