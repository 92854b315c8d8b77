"""Round layer by layer with error compensation, where that beats nearest rounding."""

from __future__ import annotations

from eptq_onnx.config import Start
from eptq_onnx.data.samples import Selection, spread
from eptq_onnx.method.judge import SAMPLES, better_than_nearest
from eptq_onnx.method.reconstruct import WALKS, reconstruct, work
from eptq_onnx.numerics.quant_math import FEW_BITS
from eptq_onnx.passes.base import Context, Cost, Judge, Pass, State
from eptq_onnx.records import Plan

_RUNS = 4
"""Runs to judge the result: of the float network, and with both roundings, which take longer."""
_SAMPLES_MANY_BITS = 96
"""Most samples to walk with if all weights have more bits than `FEW_BITS`: more bring nothing then."""


class Reconstruct(Pass):
    """Round layer by layer with error compensation, where that beats nearest rounding.

    See `eptq_onnx.method.reconstruct` and `eptq_onnx.method.judge`.
    """

    name = "reconstruct"
    requires = ("calibration", "nearest", "rounding")
    provides = ("rounding",)

    def enabled(self, ctx: Context) -> bool:
        """Return True unless optimization starts from nearest rounding."""
        return ctx.config.start is Start.CLOSED_FORM

    def cost(self, state: State, ctx: Context) -> Cost:
        """A traversal of both networks, the linear algebra of every layer, and runs that judge the result."""
        count = len(_walked(ctx, state.plan).indices)
        operations, values = work(state.executed, state.plan, ctx.config, ctx.multiplications, count)
        return Cost(
            passes=_RUNS * min(len(ctx.shares.judged), SAMPLES),
            walks=WALKS * count,
            builds=_RUNS,
            operations=operations,
            values=values,
            pieces=2 * len(state.plan.layers),
        )

    def run(self, state: State, ctx: Context) -> State:
        """Round all layers, keep what beats nearest rounding, and note the rest."""
        judge = Judge(state, ctx)
        quantized, _ = judge.written(state.nearest)
        rounded, skipped = reconstruct(
            state.network,
            quantized,
            state.nearest,
            _walked(ctx, state.plan),
            ctx.config,
            ctx.tell(self.name),
        )
        given = {x.node for x in state.plan.layers if x.weight_spec.is_given}
        notes = [f"{node} keeps nearest rounding: {w}" for node, w in skipped.items() if node not in given]
        targets = ctx.config.optimizes
        rounding, note = better_than_nearest(
            judge.noise, judge.limit, state.plan, state.nearest, rounded, targets=targets
        )
        return state.changed(rounding=rounding).noting(*notes, *[note] if note else [])


def _walked(ctx: Context, plan: Plan) -> Selection:
    """Return the samples that are walked with."""
    few = any(layer.weight_spec.bits <= FEW_BITS for layer in plan.layers)
    most = len(ctx.walked) if few else _SAMPLES_MANY_BITS
    return ctx.chosen(ctx.walked[spread(len(ctx.walked), most)], plan)
