"""Estimate the Hessian bound of layers, samples, channels and weight elements."""

from __future__ import annotations

from eptq_onnx.config import Start, WeightRange
from eptq_onnx.method.reconstruct import unsolved
from eptq_onnx.method.score import FLOAT_PASSES, score
from eptq_onnx.passes.base import Context, Cost, Pass, State


class Score(Pass):
    """Estimate the Hessian bound of layers, samples, channels and weight elements.

    See `eptq_onnx.method.score`.
    """

    name = "score"
    requires = ("calibration",)
    provides = ("scores",)
    without = "no Hessian scores, plain MSE ranges instead"

    def enabled(self, ctx: Context) -> bool:
        """Return True if weight ranges or the loss use scores."""
        return ctx.config.wants_scores

    def cost(self, state: State, ctx: Context) -> Cost:
        """One backward pass per probe."""
        return Cost(passes=FLOAT_PASSES * ctx.config.probes * len(ctx.shares.scored))

    def run(self, state: State, ctx: Context) -> State:
        """Probe the float network."""
        wanted = _scored_weights(state, ctx)
        scores = score(
            state.network,
            ctx.chosen(ctx.shares.scored),
            wanted,
            ctx.gradients,
            ctx.config,
            ctx.tell(self.name),
        )
        return state.changed(scores=scores)


def _scored_weights(state: State, ctx: Context) -> set[str]:
    """Return the weights whose scores matter: layer-wise reconstruction chooses its own ranges."""
    if ctx.config.weight_range_method is not WeightRange.HMSE:
        return set()
    skipped = unsolved(state.executed, state.plan)
    return {
        x.weight for x in state.plan.layers if ctx.config.start is not Start.CLOSED_FORM or x.node in skipped
    }
