"""Sample inputs for every row of the operator table; a row without samples fails a test.

Values keep away from the kinks of piecewise functions, so that finite differences exist.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper

from eptq_onnx.ops import LSQ_DOMAIN

OPSET = 17


@dataclass(frozen=True)
class Sample:
    """One node and its inputs; None is an absent optional input.

    ``varying`` are the positions of float inputs that are graph inputs and differentiated; the others are
    initializers.
    """

    op_type: str
    inputs: tuple[np.ndarray | None, ...]
    attributes: dict[str, object] = field(default_factory=dict)
    varying: tuple[int, ...] = (0,)
    outputs: int = 1
    domain: str = ""
    opset: int = OPSET
    differentiable: tuple[int, ...] | None = None
    """Positions whose gradient is checked (default: all that vary)."""
    output_type: int = onnx.TensorProto.FLOAT

    def model(self) -> ModelProto:
        names = [f"x{k}" if v is not None else "" for k, v in enumerate(self.inputs)]
        outputs = [f"y{k}" for k in range(self.outputs)]
        node = helper.make_node(self.op_type, names, outputs, name="node", domain=self.domain, **self.attributes)
        graph_inputs = [
            helper.make_tensor_value_info(names[k], helper.np_dtype_to_tensor_dtype(self.inputs[k].dtype), self.inputs[k].shape)
            for k in self.varying
        ]
        constants = [numpy_helper.from_array(v, names[k]) for k, v in enumerate(self.inputs) if v is not None and k not in self.varying]
        dtype = self.output_type
        graph = helper.make_graph(
            [node], "sample", graph_inputs, [helper.make_tensor_value_info(o, dtype, None) for o in outputs[:1]], constants
        )
        opsets = [helper.make_opsetid("", self.opset)] + ([helper.make_opsetid(self.domain, 1)] if self.domain else [])
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        return model if self.domain else onnx.shape_inference.infer_shapes(model, data_prop=True)

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        return {f"x{k}": self.inputs[k] for k in self.varying}

    @property
    def checked(self) -> tuple[str, ...]:
        positions = self.varying if self.differentiable is None else self.differentiable
        return tuple(f"x{k}" for k in positions if self.inputs[k].dtype == np.float32)

    def __str__(self) -> str:
        return f"{self.op_type}{''.join(f'-{k}={v}' for k, v in self.attributes.items())}-{'x'.join(map(str, self.inputs[0].shape))}"


def _x(*shape: int, low: float = -2.0, high: float = 2.0, seed: int = 0) -> np.ndarray:
    """Values on a shuffled even grid, never near 0: no ties, no kinks."""
    count = int(np.prod(shape))
    values = np.linspace(low, high, 2 * count + 1)[1::2]
    values = np.where(np.abs(values) < 0.02, 0.05, values)
    return np.random.default_rng(seed).permutation(values).reshape(shape).astype(np.float32)


def _ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _f(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def _scalar(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def _unary(op_type: str, low: float = -2.0, high: float = 2.0, **attributes: object) -> list[Sample]:
    return [Sample(op_type, (_x(2, 3, 4, low=low, high=high),), attributes)]


def _binary(op_type: str, low: float = -2.0) -> list[Sample]:
    a, b = _x(2, 3, 4, low=low), _x(2, 3, 4, low=low, seed=1)
    return [
        Sample(op_type, (a, b), varying=(0, 1)),
        Sample(op_type, (a, _x(3, 1, low=low, seed=2)), varying=(0, 1)),
        Sample(op_type, (a, _scalar(1.7))),
    ]


def _conv(k: int = 3, group: int = 1, rank: int = 2, c_in: int = 4, c_out: int = 6, **attributes: object) -> Sample:
    size = (7, 6, 5)[:rank]
    weight = _x(c_out, c_in // group, *([k] * rank), seed=1)
    return Sample("Conv", (_x(2, c_in, *size), weight, _x(c_out, seed=2)), {"group": group, **attributes}, varying=(0, 1, 2))


def _conv_transpose(group: int = 1, bias: bool = True, **attributes: object) -> Sample:
    inputs: tuple[np.ndarray | None, ...] = (_x(2, 4, 5, 4), _x(4, 6 // group, 3, 3, seed=1))
    varying: tuple[int, ...] = (0, 1)
    if bias:
        inputs, varying = (*inputs, _x(6, seed=2)), (0, 1, 2)
    return Sample("ConvTranspose", inputs, {"group": group, **attributes}, varying=varying)


def _resize(scales: tuple[float, ...] | None, sizes: tuple[int, ...] | None, **attributes: object) -> Sample:
    told = _f(*scales) if scales else None
    return Sample("Resize", (_x(2, 3, 4, 5), None, told, _ints(*sizes) if sizes else None)[: 4 if sizes else 3], attributes)


_IMAGE = _x(2, 3, 6, 5)

SAMPLES: dict[tuple[str, str], list[Sample]] = {
    ("", "Conv"): [
        _conv(),
        _conv(pads=[1, 1, 1, 1], strides=[2, 2]),
        _conv(dilations=[2, 2], pads=[2, 1, 2, 1]),
        _conv(group=2),
        _conv(group=4, c_out=4),
        _conv(group=4, c_out=8),
        _conv(k=1),
        _conv(auto_pad="SAME_UPPER", strides=[2, 2]),
        _conv(auto_pad="SAME_LOWER", strides=[2, 2]),
        _conv(auto_pad="VALID"),
        _conv(rank=1),
        _conv(rank=3, k=2),
    ],
    ("", "ConvTranspose"): [
        _conv_transpose(),
        _conv_transpose(bias=False, strides=[2, 2], pads=[1, 1, 1, 1]),
        _conv_transpose(strides=[2, 2], output_padding=[1, 1]),
        _conv_transpose(group=2, strides=[2, 1]),
        _conv_transpose(dilations=[2, 2]),
    ],
    ("", "Gemm"): [
        Sample("Gemm", (_x(3, 4), _x(4, 5, seed=1), _x(5, seed=2)), varying=(0, 1, 2)),
        Sample("Gemm", (_x(3, 4), _x(5, 4, seed=1), _x(5, seed=2)), {"transB": 1, "alpha": 0.5}, varying=(0, 1, 2)),
        Sample("Gemm", (_x(3, 4), _x(5, 4, seed=1)), {"transB": 1}, varying=(0, 1)),
    ],
    ("", "MatMul"): [
        Sample("MatMul", (_x(3, 4), _x(4, 5, seed=1)), varying=(0, 1)),
        Sample("MatMul", (_x(2, 3, 4), _x(4, 5, seed=1)), varying=(0, 1)),
        Sample("MatMul", (_x(2, 3, 4), _x(2, 4, 5, seed=1)), varying=(0, 1)),
    ],
    ("", "Add"): _binary("Add"),
    ("", "Sub"): _binary("Sub"),
    ("", "Mul"): _binary("Mul"),
    ("", "Div"): _binary("Div", low=0.5),
    ("", "Pow"): [Sample("Pow", (_x(2, 3, low=0.5), _scalar(3.0))), Sample("Pow", (_x(2, 3, low=0.5), _scalar(2.0)))],
    ("", "Concat"): [
        Sample("Concat", (_x(2, 3), _x(2, 4, seed=1)), {"axis": 1}, varying=(0, 1)),
        Sample("Concat", (_x(2, 3), _x(4, 3, seed=1), _x(1, 3, seed=2)), {"axis": 0}, varying=(0, 1)),
    ],
    ("", "Where"): [Sample("Where", (_x(2, 3) > 0, _x(2, 3, seed=1), _x(2, 3, seed=2)), varying=(1, 2))],
    ("", "AveragePool"): [
        Sample("AveragePool", (_IMAGE,), {"kernel_shape": [2, 2], "strides": [2, 2]}),
        Sample("AveragePool", (_IMAGE,), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        Sample("AveragePool", (_IMAGE,), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
        Sample("AveragePool", (_IMAGE,), {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ],
    ("", "GlobalAveragePool"): [Sample("GlobalAveragePool", (_IMAGE,))],
    ("", "LeakyRelu"): _unary("LeakyRelu") + _unary("LeakyRelu", alpha=0.3),
    ("", "Sigmoid"): _unary("Sigmoid"),
    ("", "Softmax"): _unary("Softmax") + _unary("Softmax", axis=1),
    ("", "Tanh"): _unary("Tanh"),
    ("", "HardSigmoid"): _unary("HardSigmoid") + _unary("HardSigmoid", low=-0.7, high=1.7, alpha=0.4, beta=0.3),
    ("", "HardSwish"): _unary("HardSwish", low=-5.0, high=5.0),
    ("", "PRelu"): [
        Sample("PRelu", (_IMAGE, _x(3, 1, 1, low=0.1, high=0.5))),
        Sample("PRelu", (_IMAGE, _f(0.25))),
    ],
    ("", "MaxPool"): [
        Sample("MaxPool", (_IMAGE,), {"kernel_shape": [2, 2], "strides": [2, 2]}),
        Sample("MaxPool", (_IMAGE,), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        Sample("MaxPool", (_IMAGE,), {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    ],
    ("", "Reshape"): [Sample("Reshape", (_x(2, 3, 4), _ints(2, 12))), Sample("Reshape", (_x(2, 3, 4), _ints(0, -1)))],
    ("", "Flatten"): [Sample("Flatten", (_x(2, 3, 4),)), Sample("Flatten", (_x(2, 3, 4),), {"axis": 2})],
    ("", "Squeeze"): [Sample("Squeeze", (_x(2, 1, 3), _ints(1)))],
    ("", "Unsqueeze"): [Sample("Unsqueeze", (_x(2, 3), _ints(1)))],
    ("", "Transpose"): [Sample("Transpose", (_x(2, 3, 4),), {"perm": [0, 2, 1]}), Sample("Transpose", (_x(2, 3),))],
    ("", "Slice"): [
        Sample("Slice", (_x(4, 6), _ints(1), _ints(5), _ints(1))),
        Sample("Slice", (_x(4, 6), _ints(0), _ints(6), _ints(1), _ints(2))),
    ],
    ("", "Split"): [Sample("Split", (_x(4, 6), _ints(2, 4)), {"axis": 1}, outputs=2)],
    ("", "Gather"): [Sample("Gather", (_x(4, 6), _ints(0, 2, 2)), {"axis": 1})],
    ("", "Expand"): [Sample("Expand", (_x(3, 1), _ints(2, 3, 4)))],
    ("", "Tile"): [Sample("Tile", (_x(2, 3), _ints(2, 3)))],
    ("", "Identity"): _unary("Identity"),
    ("", "Pad"): [
        Sample("Pad", (_x(2, 3), _ints(0, 1, 1, 0))),
        Sample("Pad", (_x(1, 2, 3, 3), _ints(0, 0, 1, 1, 0, 0, 1, 1), _scalar(0.5))),
    ],
    ("", "Resize"): [
        _resize((1, 1, 2, 2), None, mode="nearest", nearest_mode="floor", coordinate_transformation_mode="asymmetric"),
        _resize((1, 1, 2, 2), None, mode="linear"),
        _resize(None, (2, 3, 7, 9), mode="linear", coordinate_transformation_mode="align_corners"),
        _resize(None, (2, 3, 2, 3), mode="linear", coordinate_transformation_mode="pytorch_half_pixel"),
        _resize((1, 1, 1.5, 2.5), None, mode="cubic"),
        _resize((1, 1, 1, 3), None, mode="nearest"),
    ],
    ("", "DepthToSpace"): [Sample("DepthToSpace", (_x(2, 8, 3, 2),), {"blocksize": 2, "mode": m}) for m in ("DCR", "CRD")],
    ("", "SpaceToDepth"): [Sample("SpaceToDepth", (_x(2, 3, 4, 6),), {"blocksize": 2})],
    ("", "Relu"): _unary("Relu"),
    ("", "Clip"): [
        Sample("Clip", (_x(2, 3, 4), _scalar(-1.01), _scalar(0.99))),
        Sample("Clip", (_x(2, 3, 4), None, _scalar(0.99))),
    ],
    ("", "BatchNormalization"): [
        Sample("BatchNormalization", (_IMAGE, _f(1, -2, 0.5), _f(0, 1, 2), _f(0.1, 0.2, 0.3), _f(1, 2, 0.5)), {"epsilon": 1e-3}),
    ],
    ("", "Elu"): _unary("Elu") + _unary("Elu", alpha=0.5),
    ("", "Softplus"): _unary("Softplus"),
    ("", "LayerNormalization"): [
        Sample("LayerNormalization", (_x(2, 3, 4), _f(1, -2, 0.5, 1), _f(0, 1, 2, 3)), opset=17),
        Sample("LayerNormalization", (_x(2, 3, 4), _x(3, 4, seed=1)), {"axis": 1, "epsilon": 0.1}, opset=17),
    ],
    ("", "Mish"): [Sample("Mish", (_x(2, 3, 4),), opset=18)],
    ("", "Sum"): [Sample("Sum", (_x(2, 3), _x(2, 3, seed=1), _x(3, seed=2)), varying=(0, 1, 2)), Sample("Sum", (_x(2, 3),))],
    ("", "Mean"): [Sample("Mean", (_x(2, 3), _x(2, 3, seed=1)), varying=(0, 1))],
    ("", "ReduceSumSquare"): [
        Sample("ReduceSumSquare", (_x(2, 3, 4),), {"axes": [1], "keepdims": 0}),
        Sample("ReduceSumSquare", (_x(2, 3, 4),)),
    ],
    ("", "Abs"): _unary("Abs"),
    ("", "Cos"): _unary("Cos"),
    ("", "Erf"): _unary("Erf"),
    ("", "Exp"): _unary("Exp"),
    ("", "Log"): _unary("Log", low=0.5),
    ("", "LogSoftmax"): _unary("LogSoftmax", axis=1),
    ("", "Neg"): _unary("Neg"),
    ("", "ReduceMean"): _unary("ReduceMean", axes=[1], keepdims=1) + _unary("ReduceMean", axes=[0, 2], keepdims=0),
    ("", "ReduceSum"): [Sample("ReduceSum", (_x(2, 3, 4), _ints(1)), {"keepdims": 0})],
    ("", "ReduceL2"): _unary("ReduceL2", axes=[1], keepdims=1),
    ("", "ReduceLogSumExp"): _unary("ReduceLogSumExp", axes=[1], keepdims=1),
    ("", "Reciprocal"): _unary("Reciprocal", low=0.5),
    ("", "Sin"): _unary("Sin"),
    ("", "Sqrt"): _unary("Sqrt", low=0.5),
    ("", "Cast"): _unary("Cast", to=onnx.TensorProto.FLOAT),
    ("", "Trilu"): [Sample("Trilu", (_x(2, 4, 4),), {"upper": 0})],
    ("", "Min"): [Sample("Min", (_x(2, 3), _x(2, 3, seed=1)), varying=(0, 1))],
    ("", "Max"): [Sample("Max", (_x(2, 3), _x(2, 3, seed=1)), varying=(0, 1))],
    # The quantizers' gradients are straight-through, not those of a staircase: they have tests of their own.
    ("", "QuantizeLinear"): [
        Sample(
            "QuantizeLinear",
            (_x(2, 3), np.float32(0.2), np.uint8(7)),
            differentiable=(),
            output_type=onnx.TensorProto.UINT8,
        )
    ],
    ("", "DequantizeLinear"): [
        Sample("DequantizeLinear", (np.arange(6, dtype=np.uint8).reshape(2, 3), np.float32(0.2), np.uint8(7)), differentiable=())
    ],
    (LSQ_DOMAIN, "FakeQuant"): [
        Sample(
            "FakeQuant",
            (_x(2, 3, 4), _f(0.2), _f(7)),
            {"quant_min": 0, "quant_max": 15},
            varying=(0, 1),
            outputs=2,
            domain=LSQ_DOMAIN,
            differentiable=(),
        )
    ],
}
