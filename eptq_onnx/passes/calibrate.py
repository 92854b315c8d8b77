"""Choose activation ranges, once scores and scaled channels are known."""

from __future__ import annotations

from eptq_onnx.method.calibrate import A_READING, calibrate, check_outputs
from eptq_onnx.method.calibrate.seen import values_of_a_sample
from eptq_onnx.method.estimate import values_per_sample
from eptq_onnx.parallel import worker_count
from eptq_onnx.passes.base import Context, Cost, Pass, State


class Calibrate(Pass):
    """Choose the range of every activation.

    See `eptq_onnx.method.calibrate`.
    """

    name = "calibrate"
    provides = ("calibration",)

    def cost(self, state: State, ctx: Context) -> Cost:
        """One traversal with histograms, whose values all workers pick."""
        count = len(ctx.shares.training)
        tensors = [t for q in state.plan.activations for t in q.sources]
        values = A_READING * values_per_sample(state.executed, tensors, ctx.samples)
        counted = values_of_a_sample(ctx.training.count)
        values += values_per_sample(state.executed, tensors, ctx.samples, counted)
        return Cost(passes=ctx.others.count, walks=count, builds=2, values=count * values / worker_count())

    def run(self, state: State, ctx: Context) -> State:
        """Observe all tensors of the plan."""
        check_outputs(state.executed, ctx.others, ctx.config)
        channels = state.scores.channels if state.scores is not None else None
        tell = ctx.tell(self.name)
        return state.changed(
            calibration=calibrate(state.executed, state.plan, ctx.training, ctx.config, tell, scores=channels)
        )
