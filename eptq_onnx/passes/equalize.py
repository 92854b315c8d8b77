"""Scale channels of activations to fit their shared range."""

from __future__ import annotations

from eptq_onnx.data.samples import Samples
from eptq_onnx.method.equalize import A_MAGNITUDE, SAMPLES, equalize, needed_bytes
from eptq_onnx.method.estimate import values_per_sample
from eptq_onnx.numerics.magnitudes import VALUES
from eptq_onnx.passes.base import Context, Cost, Pass, State
from eptq_onnx.training.worth import uneven_type


class Equalize(Pass):
    """Scale channels of activations to fit their shared range.

    See `eptq_onnx.method.equalize`.
    """

    name = "equalize"
    provides = ("model", "executed", "scores", "equalized")
    switch = ("equalize", False)
    without = "no channels are scaled"
    memory_share = 4

    def enabled(self, ctx: Context) -> bool:
        """Return True if the option is on."""
        return ctx.config.equalize and ctx.config.changes_channels

    def memory(self, state: State, samples: Samples) -> int:
        """A second set of weights, and histograms of all channels."""
        return needed_bytes(state.model, state.plan)

    def cost(self, state: State, ctx: Context) -> Cost:
        """Magnitudes of all channels on a few samples, and a descent on them."""
        count = min(len(ctx.shares.training), SAMPLES)
        tensors = [t for q in state.plan.activations for t in q.tensors]
        values = A_MAGNITUDE * values_per_sample(state.executed, tensors, ctx.samples, VALUES)
        return Cost(walks=count, builds=1, values=count * values)

    def run(self, state: State, ctx: Context) -> State:
        """Scale the channels where possible."""
        floats = uneven_type(state.plan)
        if floats is not None:
            return state.noting(
                f"no channels are scaled: steps of {floats} grow with the values, so a shared range costs "
                "small channels nothing"
            )
        tell = ctx.tell(self.name)
        model, scores, equalized, notes = equalize(
            state.model, state.executed, state.plan, ctx.training, state.scores, ctx.config, tell
        )
        return state.changed(
            model=model, executed=ctx.executed(model), scores=scores, equalized=equalized
        ).noting(*notes)
