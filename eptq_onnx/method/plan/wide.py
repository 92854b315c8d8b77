"""Find the operators that compute with 16 bits and have activations of fewer.

Kernels compute with one width: the inputs and the outputs of an operator have one type. The width belongs to
the tensor, though, and all of its readers see the same values. So an operator with an activation of 16 bits
computes with 16, and its other activations are converted:

- an input of at most 8 bits gets the grid of 16 bits that has 256 steps for each of its own
  (`eptq_onnx.numerics.grid.Grid.widened`), on which its values lie exactly;
- an output of at most 8 bits is written on that grid first, and then on its own.
"""

from __future__ import annotations

from dataclasses import replace

from eptq_onnx.graph.view import GraphView
from eptq_onnx.records import FULL_BITS, Plan
from eptq_onnx.targets import Target


def with_wide(plan: Plan, view: GraphView, target: Target) -> Plan:
    """Return a plan that knows which nodes compute with 16 bits beside activations of fewer.

    Runtimes without kernels of 16 bits compute in floating point there, for which no width counts.

    Parameters
    ----------
    plan : Plan
    view : GraphView
        The normalized model.
    target : Target
    """
    if not target.activation.wide:
        return plan
    bits = {t: q.spec.bits for q in (*plan.activations, *plan.operands) for t in q.tensors}
    wide, rewritten = set[str](), set[str]()
    for name, (inputs, outputs) in activations_of(plan, view).items():
        own = {bits[t] for t in (*inputs, *outputs) if t in bits}
        if own and min(own) <= FULL_BITS < max(own):
            wide.add(name)
            rewritten.update(t for t in outputs if bits.get(t, 2 * FULL_BITS) <= FULL_BITS)
    return replace(plan, wide=frozenset(wide), rewritten=frozenset(rewritten))


def activations_of(plan: Plan, view: GraphView) -> dict[str, tuple[list[str], list[str]]]:
    """Return the inputs of each node on integers, and its outputs behind absorbed functions."""
    behind = {n.input[0]: n.output[0] for n in view.nodes if n.name in plan.absorbed}

    def final(tensor: str) -> str:
        while tensor in behind:
            tensor = behind[tensor]
        return tensor

    return {
        n.name: (list(n.input), [final(o) for o in n.output if o])
        for n in view.nodes
        if n.name in plan.integer_nodes
    }
