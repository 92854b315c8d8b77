"""Store weights below 8 bits at their size."""

from __future__ import annotations

from eptq_onnx.config import WeightStorage
from eptq_onnx.graph.native import native
from eptq_onnx.graph.packing import packed
from eptq_onnx.passes.base import Context, Pass, State


class Pack(Pass):
    """Store weights below 8 bits at their size.

    See `eptq_onnx.graph.packing` and `eptq_onnx.graph.native`.
    """

    name = "pack"
    requires = ("written",)
    provides = ("packed",)

    def run(self, state: State, ctx: Context) -> State:
        """Store the weights of the written model as the option says."""
        marked = state.written.marked
        if ctx.config.storage is WeightStorage.INT8:
            return state.changed(packed=marked)
        if ctx.config.storage is WeightStorage.PACKED:
            return state.changed(packed=packed(marked))
        stored, left = native(marked, ctx.target.weight.storage)
        state = state.changed(packed=stored)
        if not left:
            return state
        return state.noting(
            f"{len(left)} weights below 7 bits stay int8 (the first is {left[0]}): no ONNX type that "
            f"{ctx.target.name} reads holds their integers and zero points"
        )
