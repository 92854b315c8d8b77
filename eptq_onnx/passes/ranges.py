"""Choose weight ranges, and round weights to nearest."""

from __future__ import annotations

from eptq_onnx.method.ranges import weight_ranges
from eptq_onnx.passes.base import Context, Pass, State


class Ranges(Pass):
    """Choose weight ranges, and round weights to nearest.

    See `eptq_onnx.method.ranges`.
    """

    name = "ranges"
    requires = ("calibration",)
    provides = ("nearest", "rounding")

    def run(self, state: State, ctx: Context) -> State:
        """Choose scales and zero points of all weights."""
        nearest = weight_ranges(state.executed, state.plan, state.calibration, state.scores, ctx.config)
        return state.changed(nearest=nearest, rounding=nearest)
