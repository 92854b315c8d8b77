"""Put QuantizeLinear and DequantizeLinear nodes and the integers into the model."""

from __future__ import annotations

from dataclasses import replace

from eptq_onnx.method.qdq import write
from eptq_onnx.passes.base import Context, Pass, State, Written


class Write(Pass):
    """See `eptq_onnx.method.qdq`."""

    name = "write"
    requires = ("rounding",)
    provides = ("written",)

    def run(self, state: State, ctx: Context) -> State:
        """Write the model of the plan and the rounding."""
        return replace(state, written=Written(*write(state.model, state.plan, state.rounding)))
