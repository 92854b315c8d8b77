from __future__ import annotations

import numpy as np
from graphs import images, silent, small_convnet
from onnx import numpy_helper

from eptq_onnx import Config, quantize
from eptq_onnx.graph.sizes import PARTS, size_of_parts


def test_parts_make_up_the_file():
    result = quantize(small_convnet(), images(8), Config(preset="fast", measure_speed=False), progress=silent)
    sizes = size_of_parts(result.model)
    assert tuple(sizes) == PARTS
    assert sum(sizes.values()) == result.model.ByteSize()
    assert result.report.sizes == sizes
    values = [numpy_helper.to_array(t) for t in result.model.graph.initializer]
    assert sizes["weights"] == sum(v.nbytes for v in values if v.dtype == np.int8 and v.ndim > 1)
    assert sizes["biases"] == sum(layer_bias.nbytes for layer_bias in biases(result.model))
    assert sizes["scales and zero points"] > 0


def biases(model):
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    read = {n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    return [v for name, v in constants.items() if name in read and v.dtype == np.int32]
