"""Which widths the installed onnxruntime has its operator MatMulNBits for."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from eptq_onnx.errors import ModelError
from eptq_onnx.graph.nbits import MICROSOFT
from eptq_onnx.runtime import Session

_TERMS = 16


@cache
def has_matmul_nbits(bits: int) -> bool:
    """Return True if onnxruntime loads a MatMulNBits of a width; it does not say so, so that it is tried."""
    content = np.zeros((1, 1, _TERMS * bits // 8), np.uint8)
    constants = [numpy_helper.from_array(content, "w"), numpy_helper.from_array(np.ones(1, np.float32), "s")]
    sizes: dict[str, Any] = {"K": _TERMS, "N": 1, "bits": bits, "block_size": _TERMS}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain=MICROSOFT, **sizes)
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, k]) for n, k in (("x", _TERMS), ("y", 1))]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    try:
        Session(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    except ModelError:
        return False
    return True
