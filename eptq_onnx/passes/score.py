"""Estimate the Hessian bound of layers, samples, channels and weight elements."""

from __future__ import annotations

from eptq_onnx.config import Start, WeightRange
from eptq_onnx.method.calibrate import output_spreads
from eptq_onnx.method.reconstruct import unsolved
from eptq_onnx.method.score import FLOAT_PASSES, score
from eptq_onnx.passes.base import Context, Cost, Pass, State
from eptq_onnx.records import Network


class Score(Pass):
    """Estimate the Hessian bound of layers, samples, channels and weight elements.

    See `eptq_onnx.method.score`.
    """

    name = "score"
    provides = ("scores",)
    without = "no Hessian scores, plain MSE ranges instead"

    def enabled(self, ctx: Context) -> bool:
        """Return True if weight ranges or the loss use scores."""
        return ctx.config.wants_scores

    def cost(self, state: State, ctx: Context) -> Cost:
        """A float pass for the spread of the outputs, one with all tensors, a backward pass per probe."""
        probes = FLOAT_PASSES * ctx.config.probes * len(ctx.shares.scored)
        return Cost(passes=len(ctx.shares.training) + probes, walks=len(ctx.shares.scored), builds=6)

    def run(self, state: State, ctx: Context) -> State:
        """Probe the float network."""
        wanted, tell = _scored_weights(state, ctx), ctx.tell(self.name)
        spreads = output_spreads(state.executed, ctx.training, ctx.config, tell)
        network = Network(state.executed, state.plan, spreads)
        scores = score(network, ctx.chosen(ctx.shares.scored), wanted, ctx.gradients, ctx.config, tell)
        return state.changed(scores=scores)


def _scored_weights(state: State, ctx: Context) -> set[str]:
    """Return the weights whose scores matter: layer-wise reconstruction chooses its own ranges."""
    if ctx.config.weight_range_method is not WeightRange.HMSE:
        return set()
    skipped = unsolved(state.executed, state.plan)
    return {
        x.weight for x in state.plan.layers if ctx.config.start is not Start.CLOSED_FORM or x.node in skipped
    }
