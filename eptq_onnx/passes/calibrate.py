"""Choose activation ranges, once scores and scaled channels are known."""

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
        channels = state.scores.channels if state.scores is not None else None
        tell = ctx.tell(self.name)
        return state.changed(
            calibration=calibrate(state.executed, state.plan, ctx.training, ctx.config, tell, scores=channels)
        )
