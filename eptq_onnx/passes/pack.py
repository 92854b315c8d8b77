"""Store weights below 8 bits at their size."""

from __future__ import annotations

from eptq_onnx.config import WeightStorage
from eptq_onnx.graph.packing import packed
from eptq_onnx.passes.base import Context, Pass, State


class Pack(Pass):
    """Store weights below 8 bits at their size.

    See `eptq_onnx.graph.packing`.
    """

    name = "pack"
    requires = ("written",)
    provides = ("packed",)

    def run(self, state: State, ctx: Context) -> State:
        """Pack the weights of the written model, unless they are to stay in int8."""
        marked = state.written.marked
        return state.changed(packed=marked if ctx.config.storage is WeightStorage.INT8 else packed(marked))
