"""Insert QuantizeLinear and DequantizeLinear nodes and the integer weights."""

from __future__ import annotations

from eptq_onnx.method.qdq import write
from eptq_onnx.method.signature import sign
from eptq_onnx.passes.base import Context, Pass, State, Written


class Write(Pass):
    """Insert QuantizeLinear and DequantizeLinear nodes and the integer weights.

    See `eptq_onnx.method.qdq`.
    """

    name = "write"
    requires = ("rounding",)
    provides = ("written",)

    def run(self, state: State, ctx: Context) -> State:
        """Write the model, with metadata that says what made it."""
        marked, stands_for = write(state.model, state.plan, state.rounding)
        sign(marked, ctx.given, ctx.target)
        return state.changed(written=Written(marked, stands_for))
