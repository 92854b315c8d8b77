"""Compare the written model with the float model by running both."""

from __future__ import annotations

from eptq_onnx.method.verify import Versions, verify
from eptq_onnx.passes.base import Context, Pass, State


class Verify(Pass):
    """Compare the written model with the float model by running both.

    See `eptq_onnx.method.verify`.
    """

    name = "verify"
    requires = ("written", "packed")
    provides = ("verification",)

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
