"""Store weights below 8 bits in the bytes that their bits need."""

from __future__ import annotations

from eptq_onnx.config import WeightStorage
from eptq_onnx.graph.native import native
from eptq_onnx.graph.packing import packed
from eptq_onnx.numerics.bitpacking import LAYOUTS
from eptq_onnx.passes.base import Context, Pass, State


class Pack(Pass):
    """Store weights below 8 bits in the bytes that their bits need.

    See `eptq_onnx.graph.packing` and `eptq_onnx.graph.native`.
    """

    name = "pack"
    requires = ("written",)
    provides = ("packed",)

    def run(self, state: State, ctx: Context) -> State:
        """Store the weights of the written model as the option ``storage`` says."""
        marked = state.written.marked
        storage = ctx.target.storage_for(ctx.config.storage)
        if storage is WeightStorage.INT8:
            state = state.changed(packed=marked)
            if ctx.config.storage is None and _has_narrow(state):
                return state.noting(
                    f"weights below 7 bits take a byte each: {ctx.target.name} does not unpack packed weights"
                )
            return state
        if storage is WeightStorage.PACKED:
            stored = packed(marked)
            state = state.changed(packed=stored)
            if stored is marked and _has_narrow(state):
                return state.noting(
                    "weights below 7 bits take a byte each: nodes that unpack such small ones would be larger"
                )
            return state
        stored, left = native(marked, ctx.target.weight.storage)
        state = state.changed(packed=stored)
        if not left:
            return state
        return state.noting(
            f"{len(left)} weights below 7 bits stay int8 (the first is {left[0]}): no ONNX type that "
            f"{ctx.target.name} reads holds their integers and zero points"
        )


def _has_narrow(state: State) -> bool:
    """Return True if a weight has so few bits that it may be packed."""
    return any(spec.bits in LAYOUTS for spec in state.plan.weight_specs.values())
