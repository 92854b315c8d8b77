"""Choose the bits of every weight under a budget."""

from __future__ import annotations

from eptq_onnx.method.allocate import SAMPLES, allocate
from eptq_onnx.passes.base import Context, Cost, Pass, State


class Allocate(Pass):
    """Choose the bits of every weight under a budget.

    See `eptq_onnx.method.allocate`.
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
        plan = allocate(
            state.network, ctx.chosen(ctx.walked), ctx.target, budget, ctx.config, ctx.tell(self.name)
        )
        return state.changed(plan=plan)
