"""The gradient engine that needs only onnxruntime: the backward pass consists of standard ONNX nodes.

Reverse-mode differentiation: the rules of each node (`rules`) turn the gradient of its output into those of
its inputs, and the contributions of all consumers of a tensor are summed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from eptq_onnx import ops, runtime
from eptq_onnx.engines.base import UNREACHED, Engine, GradientModel, reachable
from eptq_onnx.engines.rules import rule_of
from eptq_onnx.engines.tape import FLOAT_OR_UNKNOWN, Tape, refusal
from eptq_onnx.graph import edit
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.lower import lower
from eptq_onnx.graph.view import GraphView


class StandardEngine(Engine):
    """Engine with gradient rules of its own.

    Raises
    ------
    InstallError
        If onnxruntime is missing or damaged.
    """

    name = "standard"
    about = "rules of our own, any onnxruntime"
    preference = 0

    def __init__(self) -> None:
        runtime.load()

    def differentiate(self, model: ModelProto, loss: str, wrt: Sequence[str]) -> GradientModel:
        """See `Engine.differentiate`."""
        blocked = ops.without_gradient(GraphView(model))
        reached, unreached = reachable(GraphView(model), loss, wrt, blocked)
        private = edit.with_nodes(model, model.graph.node)
        edit.promote_to_inputs(private, reached)
        edit.set_outputs(private, list(dict.fromkeys([loss, *(o.name for o in model.graph.output)])))
        result = infer_shapes(lower(private, ops.QUANTIZERS)[0])
        tape = Tape(GraphView(result), edit.Builder(result, "gradient/"))
        found = _backward(_with_quantizers(private, tape.view), loss, reached, blocked, tape)
        builder = tape.builder
        gradients = {
            name: builder.add("Identity", [found[name]], builder.unique(f"{name}_grad")) for name in found
        }
        result.graph.node.extend(builder.nodes)
        result.graph.initializer.extend(builder.initializers)
        result.graph.output.extend(
            helper.make_tensor_value_info(g, TensorProto.FLOAT, tape.view.shape(x))
            for x, g in gradients.items()
        )
        unreached |= {name: UNREACHED for name in reached if name not in found}
        return GradientModel(result, gradients, unreached)


def _with_quantizers(model: ModelProto, runnable: GraphView) -> list[NodeProto]:
    """Return the nodes to differentiate: those of the runnable graph, but quantizers in their original form.

    There are rules for the original quantizers only.
    """
    twins = [runnable.producer[next(filter(None, node.output))] for node in model.graph.node]
    return [
        twin if twin.op_type == node.op_type else node
        for node, twin in zip(model.graph.node, twins, strict=True)
    ]


def _backward(
    nodes: list[NodeProto], loss: str, wrt: Sequence[str], blocked: frozenset[str], t: Tape
) -> dict[str, str]:
    """Add the backward pass and return, for each tensor of ``wrt``, the tensor that holds its gradient."""
    active = t.view.downstream(wrt, blocked)
    parts: dict[str, list[str]] = defaultdict(list)
    parts[loss].append(t.builder.constant(np.ones(t.shape(loss), np.float32), "one"))

    def total(name: str) -> str | None:
        while len(parts[name]) > 1:
            parts[name].append(t.add("Add", parts[name].pop(), parts[name].pop()))
        return parts[name][0] if parts[name] else None

    for node in reversed(nodes):
        dy, *others = [total(name) for name in node.output]
        if node.name in blocked:
            continue
        if any(others):
            raise refusal(node, "an output other than the first is used")
        for k, name in enumerate(node.input):
            if dy is None or name not in active:
                continue
            rule = rule_of(node, k)
            if rule is None and t.view.elem_type(name) in FLOAT_OR_UNKNOWN:
                raise refusal(node, f"there is no rule for its input {k}, {name}")
            dx = rule(t, node, k, dy) if rule is not None else None
            if dx is not None:
                parts[name].append(dx)
    return {name: gradient for name in wrt if (gradient := total(name)) is not None}
