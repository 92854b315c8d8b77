"""Mix channels between layers that only linear operators separate."""

from __future__ import annotations

from eptq_onnx.data.samples import Samples
from eptq_onnx.method.rotate import needed_bytes, operations, rotate
from eptq_onnx.passes.base import Context, Cost, Pass, State
from eptq_onnx.training.worth import uneven_type


class Rotate(Pass):
    """Mix channels between layers that only linear operators separate.

    See `eptq_onnx.method.rotate`.
    """

    name = "rotate"
    provides = ("model", "executed", "rotated")
    switch = ("rotate", False)
    without = "no channels are mixed"
    memory_share = 4

    def enabled(self, ctx: Context) -> bool:
        """Return True if the option is on."""
        return ctx.config.rotate and ctx.config.changes_channels

    def cost(self, state: State, ctx: Context) -> Cost:
        """The descents on rotations."""
        floats = uneven_type(state.plan) is not None
        return Cost(operations=0.0 if floats else operations(state.model, state.plan))

    def memory(self, state: State, samples: Samples) -> int:
        """Two sets of weights."""
        return needed_bytes(state.model)

    def run(self, state: State, ctx: Context) -> State:
        """Mix channels where possible."""
        floats = uneven_type(state.plan)
        if floats is not None:
            return state.noting(
                f"no channels are mixed: steps of {floats} grow with the values, so spreading large weights "
                "gains nothing"
            )
        model, rotated, left = rotate(state.model, state.plan, ctx.config, ctx.tell(self.name))
        return state.changed(model=model, executed=ctx.executed(model), rotated=rotated).noting(*left)
