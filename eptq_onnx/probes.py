"""What the installed onnxruntime can do on this machine, probed with tiny models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from eptq_onnx.errors import ModelError
from eptq_onnx.runtime import LAYOUT_DOMAIN, Session

_OLDEST_OPSET, _OLDEST_IR = 19, 9
"""Opset and IR version that every supported onnxruntime reads."""


@cache
def newest_readable() -> tuple[int, int]:
    """Return the highest default-domain opset and IR version of quantized models that can be run here.

    onnx must be able to write them, and the installed onnxruntime to run them. onnxruntime does not expose
    this, so it is probed.
    """
    opset = _highest(
        lambda version: _tiny(version, _OLDEST_IR), _OLDEST_OPSET, onnx.defs.onnx_opset_version()
    )
    return opset, _highest(lambda version: _tiny(_OLDEST_OPSET, version), _OLDEST_IR, onnx.IR_VERSION)


def _tiny(opset: int, ir_version: int) -> ModelProto:
    """Return a minimal quantized model, a matrix product.

    onnxruntime 1.19 reads opset 21, but has no integer kernel for this pattern there.
    """
    info = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1]) for name in "xy"]
    values: dict[str, NDArray[Any]] = {
        "one": np.array(1, np.float32),
        "zero": np.array(0, np.uint8),
        "weight": np.array([[1]], np.uint8),
    }
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
        for name, value in values.items()
    ]
    for op_type, x, y in (("Quantize", "x", "q"), ("Dequantize", "q", "d"), ("Dequantize", "weight", "w")):
        nodes.append(helper.make_node(f"{op_type}Linear", [x, "one", "zero"], [y]))
    nodes.append(helper.make_node("MatMul", ["d", "w"], ["product"]))
    for op_type, x, y in (("Quantize", "product", "p"), ("Dequantize", "p", "y")):
        nodes.append(helper.make_node(f"{op_type}Linear", [x, "one", "zero"], [y]))
    graph = helper.make_graph(nodes, "tiny", info[:1], info[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


@cache
def channel_block() -> int:
    """Return the channels per block of onnxruntime's blocked image layout (NCHWc) on this machine, 0 if none.

    onnxruntime does not expose the number, so it is read off the positions of values in a reordered image.
    """
    image = np.tile(np.arange(2, dtype=np.float32), (1, 64, 1, 1))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, image.shape) for name in "xy")
    graph = helper.make_graph(
        [helper.make_node("ReorderInput", ["x"], ["y"], domain=LAYOUT_DOMAIN)], "order", [x], [y]
    )
    opsets = [helper.make_opsetid("", _OLDEST_OPSET), helper.make_opsetid(LAYOUT_DOMAIN, 1)]
    try:
        session = Session(helper.make_model(graph, opset_imports=opsets, ir_version=_OLDEST_IR))
        return int(np.argmax(session.run({"x": image})["y"]))
    except ModelError:
        return 0


def _highest(model: Callable[[int], ModelProto], low: int, high: int) -> int:
    for version in range(high, low, -1):
        try:
            Session(model(version))
        except ModelError:
            continue
        return version
    return low
