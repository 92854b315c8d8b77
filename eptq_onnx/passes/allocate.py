"""Choose the bits of every weight under a budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from onnx import ModelProto

from eptq_onnx.config import Budget, BudgetUnit, Start
from eptq_onnx.graph.branches import sink
from eptq_onnx.graph.file_count import FileCount, FileSizes, Storing
from eptq_onnx.graph.message_sizes import file_bytes
from eptq_onnx.graph.packing import weights_of
from eptq_onnx.graph.storing import stored
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.allocate import SAMPLES, WIDTHS, allocate, candidates, solve, with_widths
from eptq_onnx.method.fit_bytes import fit_bytes
from eptq_onnx.method.qdq import write
from eptq_onnx.method.ranges import weight_ranges
from eptq_onnx.method.signature import sign
from eptq_onnx.passes.base import Context, Cost, Pass, State
from eptq_onnx.records import Plan

_TRIALS = 4
"""Maximum number of files written to correct the count."""


class Allocate(Pass):
    """Choose the bits of every weight under a budget.

    See `eptq_onnx.method.allocate`; a budget of bytes, `eptq_onnx.method.fit_bytes`.
    """

    name = "allocate"
    requires = ("calibration",)
    provides = ("plan",)

    def enabled(self, ctx: Context) -> bool:
        """True if there is a budget."""
        return ctx.config.budget is not None

    def cost(self, state: State, ctx: Context) -> Cost:
        """One run per layer."""
        return Cost(passes=SAMPLES * len(state.plan.layers))

    def run(self, state: State, ctx: Context) -> State:
        """Choose the bits of every weight."""
        budget = ctx.config.budget
        if budget is None:
            return state
        if budget.unit is BudgetUnit.BYTES:
            return state.changed(plan=_within_bytes(state, ctx, budget))
        selection, tell = ctx.chosen(ctx.walked), ctx.tell(self.name)
        return state.changed(plan=allocate(state.network, selection, ctx.target, budget, ctx.config, tell))


def _within_bytes(state: State, ctx: Context, budget: Budget) -> Plan:
    """Choose the bits of every weight so that the file takes at most the bytes of the budget."""
    found = candidates(state.network, ctx.chosen(ctx.walked), ctx.target, ctx.config, ctx.tell(Allocate.name))
    effects = {name: weight.effects for name, weight in found.items()}
    written = _trial(state, ctx, state.plan)
    names = dict(zip(state.plan.weight_specs, weights_of(GraphView(written)), strict=False))
    storing = _storing(state.plan, ctx)
    count = FileCount(written, names, storing)

    def choose(sizes: FileSizes, allowed: int) -> dict[str, int]:
        return solve(found, budget.model_copy(update={"amount": allowed}), sizes)

    for trial in range(_TRIALS):
        widths = fit_bytes(choose, effects, count, int(budget.amount))
        plan = with_widths(state.plan, widths, ctx.target)
        made, _ = stored(_trial(state, ctx, plan), storing.storage, storing.types)
        more = file_bytes(sink(made)) - count.bytes(widths)
        if more == 0 or (more < 0 and trial):
            break
        count = count.corrected(more)
    return plan


def _trial(state: State, ctx: Context, plan: Plan) -> ModelProto:
    """Return a file with these widths and weights rounded to nearest, in int8."""
    extremes = weight_ranges(state.executed, plan, state.calibration, state.scores, ctx.config, searched=())
    learned = ctx.config.optimizes or ctx.config.start is Start.CLOSED_FORM
    biases = {
        name: np.ones_like(values) if learned and not values.any() else values
        for name, values in extremes.biases.items()
    }
    written, _ = write(state.model, plan, replace(extremes, biases=biases))
    sign(written, ctx.given, ctx.target)
    return written


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
