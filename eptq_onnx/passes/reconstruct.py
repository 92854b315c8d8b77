"""Round layer by layer with error compensation, where that beats nearest rounding."""

from __future__ import annotations

from eptq_onnx.config import Start
from eptq_onnx.method.judge import better_than_nearest
from eptq_onnx.method.reconstruct import (
    FLOAT_PASSES,
    OPERATIONS_A_LAYER,
    SLOWNESS,
    operations,
    reconstruct,
)
from eptq_onnx.passes.base import Context, Cost, Judge, Pass, State


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
        """A traversal of both networks, and the linear algebra of every layer."""
        count = len(ctx.walked)
        algebra = operations(state.executed, state.plan, ctx.config, ctx.multiplications, count)
        return Cost(
            passes=FLOAT_PASSES * count,
            operations=SLOWNESS * algebra + OPERATIONS_A_LAYER * len(state.plan.layers),
        )

    def run(self, state: State, ctx: Context) -> State:
        """Round all layers, keep what beats nearest rounding, and note the rest."""
        judge = Judge(state, ctx)
        quantized, _ = judge.written(state.nearest)
        rounded, skipped = reconstruct(
            state.network,
            quantized,
            state.nearest,
            ctx.chosen(ctx.walked, state.plan),
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
