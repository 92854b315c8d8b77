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
from eptq_onnx.placement import InFloat
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

    def in_float(self, exact: ModelProto, stored: Trial | None) -> dict[str, InFloat]:
        """Return what each weight takes in layers that compute in float.

        Parameters
        ----------
        exact : ModelProto
            The float network.
        stored : Trial or None
            The file in which all layers compute in float on stored weights; None if no weight can be stored.
        """
        floats = GraphView(exact).initializers
        ours, theirs = self._around(), {} if stored is None else stored._around()
        found: dict[str, InFloat] = {}
        for layer in self.plan.layers:
            own = [layer.weight] if layer.weight not in found else []
            own += [layer.bias] if layer.bias is not None and layer.has_bias else []
            more = sum(field_bytes(int(floats[name].ByteSize())) for name in own) - ours[layer.node]
            known = found.get(layer.weight, InFloat(0, 0))
            held = None
            if layer.node in theirs and known.stored is not None:
                held = known.stored + theirs[layer.node] - ours[layer.node]
            found[layer.weight] = InFloat(known.exact + more, held)
        return found

    def _around(self) -> dict[str, int]:
        """Return the bytes of nodes and constants around the integers of each layer, with its bias."""
        view, names, found = GraphView(self.model), self.names, dict[str, int]()
        nodes = {node.name: node for node in view.nodes}
        for layer in self.plan.layers:
            inputs = {i for i in nodes[layer.node].input if i}
            fixed = {i for i in inputs if view.is_constant(i)}
            makers: list[NodeProto] = []
            waiting = [view.producer[i] for i in inputs if i in view.producer]
            while waiting:
                node = waiting.pop()
                if all(_is_fixed(view, i) for i in node.input):
                    makers.append(node)
                    waiting += [view.producer[i] for i in node.input if i in view.producer]
            bias = sum(field_bytes(int(view.initializers[name].ByteSize())) for name in fixed)
            found[layer.node] = bias + _bytes_of(view, makers, without=names[layer.weight])
        return found


def _is_fixed(view: GraphView, tensor: str) -> bool:
    """Return True if a tensor is a constant, perhaps cast."""
    while (maker := view.producer.get(tensor)) is not None and maker.op_type == "Cast":
        tensor = maker.input[0]
    return view.is_constant(tensor)


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
