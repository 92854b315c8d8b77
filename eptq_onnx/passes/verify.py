"""Compare the written model with the float model by running both."""

from __future__ import annotations

from eptq_onnx.method.verify import RUNS, WALKS, Versions, verify
from eptq_onnx.outcome import LAYER_SAMPLES
from eptq_onnx.passes.base import Context, Cost, Pass, State


class Verify(Pass):
    """Compare the written model with the float model by running both.

    See `eptq_onnx.method.verify`.
    """

    name = "verify"
    requires = ("written", "packed")
    provides = ("verification",)

    def cost(self, state: State, ctx: Context) -> Cost:
        """Runs and walks of both networks."""
        unseen = len(ctx.shares.unseen)
        return Cost(
            passes=RUNS * unseen,
            walks=WALKS * min(unseen, LAYER_SAMPLES),
            builds=3,
            pieces=2 * len(state.plan.layers),
        )

    def run(self, state: State, ctx: Context) -> State:
        """Compare outputs and layers, and count integer kernels."""
        written = state.written
        versions = Versions(
            state.model,
            written.marked,
            state.packed,
            written.stands_for,
            ctx.float_bytes,
            ctx.config.outputs,
        )
        found = verify(
            versions,
            state.plan,
            ctx.target,
            ctx.samples_of(state.plan),
            ctx.shares,
            ctx.found,
            ctx.tell(self.name),
        )
        return state.changed(verification=found)
