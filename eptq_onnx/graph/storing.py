"""Store the weights of a quantized model as an option says."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import ModelProto

from eptq_onnx.config import WeightStorage
from eptq_onnx.graph.integer_products import integer_products
from eptq_onnx.graph.native import native
from eptq_onnx.graph.nbits import dequantized, matmul_nbits, packed_tables
from eptq_onnx.graph.packing import packed


def stored(model: ModelProto, storage: WeightStorage, types: Sequence[int]) -> tuple[ModelProto, list[str]]:
    """Return a model with its weights as the option ``storage`` says, and dynamic products of integers.

    Parameters
    ----------
    model : ModelProto
        With weights in int8; it is not changed, and returned as it is if there is nothing to do.
    storage : WeightStorage
    types : sequence of int
        Widths of the ONNX types below 8 bits that the runtime supports, for native storage.

    Returns
    -------
    ModelProto
    list of str
        Weights of few bits that no type holds; see `eptq_onnx.graph.native`.
    """
    model = integer_products(model)
    if storage is WeightStorage.NATIVE:
        return native(model, types)
    return packed(model) if storage is WeightStorage.PACKED else model, []


def stored_in_blocks(
    model: ModelProto, storage: WeightStorage, widths: Sequence[int], accuracy_level: int
) -> ModelProto:
    """Return a model with its weights in blocks as the option ``storage`` says; others stay as they are.

    Parameters
    ----------
    model : ModelProto
        It is not changed. What becomes neither MatMulNBits nor DequantizeLinear is left to `stored`.
    storage : WeightStorage
    widths : sequence of int
        Those of MatMulNBits, or of ONNX types.
    accuracy_level : int
        See `eptq_onnx.targets.rows.BlockRules`.
    """
    if storage is WeightStorage.MATMULNBITS:
        model = matmul_nbits(model, widths, accuracy_level)
    elif storage is WeightStorage.NATIVE:
        model = dequantized(model, widths)
    return model if storage is WeightStorage.INT8 else packed_tables(model)
