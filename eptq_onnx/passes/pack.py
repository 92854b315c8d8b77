"""Store weights below 8 bits in the bytes that their bits need."""

from __future__ import annotations

from eptq_onnx.config import WeightStorage
from eptq_onnx.graph.storing import stored
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
        made, left = stored(marked, storage, ctx.target.weight.storage)
        state = state.changed(packed=made)
        if left:
            return state.noting(
                f"{len(left)} weights below 7 bits stay int8 (the first is {left[0]}): no ONNX type that "
                f"{ctx.target.name} reads holds their integers and zero points"
            )
        if made is not marked or not _has_narrow(state):
            return state
        if storage is WeightStorage.PACKED:
            return state.noting(
                "weights below 7 bits take a byte each: nodes that unpack such small ones would be larger"
            )
        if storage is WeightStorage.INT8 and ctx.config.storage is None:
            return state.noting(
                f"weights below 7 bits take a byte each: {ctx.target.name} does not unpack packed weights"
            )
        return state


def _has_narrow(state: State) -> bool:
    """Return True if a weight has so few bits that it may be packed."""
    return any(spec.bits in LAYOUTS for spec in state.plan.weight_specs.values())
