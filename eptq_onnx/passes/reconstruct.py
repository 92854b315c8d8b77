"""Round layer by layer with error compensation, where that beats nearest rounding."""

from __future__ import annotations

from eptq_onnx.config import Start
from eptq_onnx.data.samples import Selection, spread
from eptq_onnx.method.judge import SAMPLES, better_than_nearest
from eptq_onnx.method.reconstruct import WALKS, enough_samples, reconstruct, work
from eptq_onnx.passes.base import Context, Cost, Judge, Pass, State

_RUNS = 4
"""Runs to judge the result: of the float network, and with both roundings, which take longer."""


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
        count = len(_walked(state, ctx).indices)
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
            _walked(state, ctx),
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


def _walked(state: State, ctx: Context) -> Selection:
    """Return the samples that are walked with."""
    enough = enough_samples(state.executed, state.plan, ctx.multiplications)
    return ctx.chosen(ctx.walked[spread(len(ctx.walked), enough)], state.plan)
