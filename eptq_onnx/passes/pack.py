"""Store weights below 8 bits in the bytes that their bits need."""

from __future__ import annotations

from eptq_onnx.config import WeightStorage
from eptq_onnx.graph.storing import stored, stored_in_blocks
from eptq_onnx.numerics.bitpacking import LAYOUTS
from eptq_onnx.numerics.formats import PerBlock
from eptq_onnx.passes.base import Context, Pass, State
from eptq_onnx.runtimes.nbits import has_matmul_nbits
from eptq_onnx.targets import ONNXRUNTIME


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
        storage = ctx.target.storage_for(ctx.config.storage, ctx.config.block)
        if ctx.config.block is not None:
            return _in_blocks(state, ctx, storage)
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


def _in_blocks(state: State, ctx: Context, storage: WeightStorage) -> State:
    """Store weights in blocks as the option says, and the others packed where the runtime unpacks them."""
    rules, weight = ctx.target.blocks, ctx.target.weight
    widths: list[int] = [4, 8, *(w for w in weight.storage if w == 2)]
    notes = []
    if storage is WeightStorage.MATMULNBITS:
        widths = list(rules.matmul_nbits)
        missing = [w for w in widths if ctx.target.verifier == ONNXRUNTIME and not has_matmul_nbits(w)]
        used = {
            x.weight_spec.bits for x in state.plan.layers if isinstance(x.weight_spec.granularity, PerBlock)
        }
        if used & set(missing):
            widths = [w for w in widths if w not in missing]
            notes.append(
                f"weights of {missing[0]} bits are computed in float: the installed onnxruntime has no "
                "MatMulNBits of that width, as newer ones do"
            )
    made = stored_in_blocks(state.written.marked, storage, widths, rules.accuracy_level)
    rest = WeightStorage.PACKED if weight.packed and storage is not WeightStorage.INT8 else WeightStorage.INT8
    made, _ = stored(made, rest, weight.storage)
    return state.changed(packed=made).noting(*notes)


def _has_narrow(state: State) -> bool:
    """Return True if a weight has so few bits that it may be packed."""
    return any(spec.bits in LAYOUTS for spec in state.plan.weight_specs.values())
