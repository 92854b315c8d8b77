"""Choose activation ranges, and choose them again once scores and scaled channels are known."""

from __future__ import annotations

from eptq_onnx.method.calibrate import FLOAT_PASSES, calibrate, check_outputs
from eptq_onnx.passes.base import Context, Cost, Pass, State


class Calibrate(Pass):
    """Choose the range of every activation.

    See `eptq_onnx.method.calibrate`.
    """

    name = "calibrate"
    provides = ("calibration",)

    def cost(self, state: State, ctx: Context) -> Cost:
        """One traversal with histograms."""
        return Cost(passes=FLOAT_PASSES * len(ctx.shares.training))

    def run(self, state: State, ctx: Context) -> State:
        """Observe all tensors of the plan."""
        check_outputs(state.executed, ctx.others, ctx.config)
        return state.changed(
            calibration=calibrate(state.executed, state.plan, ctx.training, ctx.config, ctx.tell(self.name))
        )


class Recalibrate(Pass):
    """Choose the ranges of activations again, now that scores and scaled channels are known."""

    name = "recalibrate"
    requires = ("calibration",)
    provides = ("calibration",)

    def enabled(self, ctx: Context) -> bool:
        """Return True if there may be scores or scaled channels."""
        return ctx.config.wants_scores or ctx.config.equalize

    def cost(self, state: State, ctx: Context) -> Cost:
        """One traversal with histograms."""
        return Cost(passes=FLOAT_PASSES * len(ctx.shares.training))

    def run(self, state: State, ctx: Context) -> State:
        """Observe all tensors of the plan again if anything changed."""
        if state.scores is None and not state.equalized:
            return state
        known = state.calibration.grids
        if state.equalized:
            # No channels of tables are scaled.
            known = {q.name: known[q.name] for q in state.plan.tables}
        channels = state.scores.channels if state.scores is not None else None
        tell = ctx.tell(self.name)
        return state.changed(
            calibration=calibrate(
                state.executed, state.plan, ctx.training, ctx.config, tell, scores=channels, known=known
            )
        )
