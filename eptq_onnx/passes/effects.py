"""Measure what every width of every weight does to the outputs."""

from __future__ import annotations

from eptq_onnx.method.allocate import SAMPLES, candidates
from eptq_onnx.passes.base import Context, Cost, Pass, State


class Effects(Pass):
    """Measure what every width of every weight does to the outputs.

    See `eptq_onnx.method.allocate`.
    """

    name = "effects"
    requires = ("calibration",)
    provides = ("effects",)

    def enabled(self, ctx: Context) -> bool:
        """Return True if each weight gets a width of its own."""
        return ctx.config.chooses_widths

    def cost(self, state: State, ctx: Context) -> Cost:
        """One run per layer."""
        return Cost(passes=SAMPLES * len(state.plan.layers))

    def run(self, state: State, ctx: Context) -> State:
        """Measure."""
        selection, tell = ctx.chosen(ctx.walked), ctx.tell(self.name)
        found = candidates(state.network, selection, ctx.target, ctx.config, tell)
        return state.changed(effects=found)
