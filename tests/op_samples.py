"""Sample inputs for every row of the operator table; a row without samples fails a test."""

from __future__ import annotations

import numpy as np
import onnx
from op_sample import (
    MS,
    Sample,
    binary,
    conv,
    conv_transpose,
    einsum,
    f,
    grid,
    ints,
    ms,
    recurrent,
    reduction,
    resize,
    scalar,
    unary,
)

from eptq_onnx.ops import LSQ_DOMAIN

_IMAGE = grid(2, 3, 6, 5)
_STATISTICS = (f(1, -2, 0.5), f(0, 1, 2), f(0.1, 0.2, 0.3), f(1, 2, 0.5))
_ROIS = np.array([[1.3, 2.1, 9.4, 11.2], [0.4, 3.3, 14.1, 12.7]], np.float32)
_SKIP = (grid(2, 3, 4), grid(2, 3, 4, seed=1))
_QKV = (grid(2, 3, 4), grid(4, 12, seed=1), grid(12, seed=2))

SAMPLES: dict[tuple[str, str], list[Sample]] = {
    ("", "Conv"): [
        conv(),
        conv(pads=[1, 1, 1, 1], strides=[2, 2]),
        conv(dilations=[2, 2], pads=[2, 1, 2, 1]),
        conv(group=2),
        conv(group=4, c_out=4),
        conv(group=4, c_out=8),
        conv(k=1),
        conv(auto_pad="SAME_UPPER", strides=[2, 2]),
        conv(auto_pad="SAME_LOWER", strides=[2, 2]),
        conv(auto_pad="VALID"),
        conv(rank=1),
        conv(rank=3, k=2),
    ],
    ("", "ConvTranspose"): [
        conv_transpose(),
        conv_transpose(bias=False, strides=[2, 2], pads=[1, 1, 1, 1]),
        conv_transpose(strides=[2, 2], output_padding=[1, 1]),
        conv_transpose(group=2, strides=[2, 1]),
        conv_transpose(dilations=[2, 2]),
        conv_transpose(strides=[2, 2], auto_pad="SAME_UPPER"),
        conv_transpose(strides=[2, 2], auto_pad="SAME_LOWER"),
        conv_transpose(strides=[2, 2], output_shape=[10, 9]),
        Sample(
            "ConvTranspose",
            (grid(2, 4, 5), grid(4, 3, 3, seed=1), grid(3, seed=2)),
            {"strides": [2]},
            varying=(0, 1, 2),
        ),
        Sample(
            "ConvTranspose",
            (grid(1, 2, 3, 2, 3), grid(2, 3, 2, 2, 2, seed=1), grid(3, seed=2)),
            varying=(0, 1, 2),
        ),
    ],
    ("", "Gemm"): [
        Sample("Gemm", (grid(3, 4), grid(4, 5, seed=1), grid(5, seed=2)), varying=(0, 1, 2)),
        Sample(
            "Gemm",
            (grid(3, 4), grid(5, 4, seed=1), grid(5, seed=2)),
            {"transB": 1, "alpha": 0.5},
            varying=(0, 1, 2),
        ),
        Sample("Gemm", (grid(3, 4), grid(5, 4, seed=1)), {"transB": 1}, varying=(0, 1)),
        Sample(
            "Gemm",
            (grid(4, 3), grid(4, 5, seed=1), grid(3, 1, seed=2)),
            {"transA": 1, "beta": 0.5},
            varying=(0, 1, 2),
        ),
    ],
    ("", "MatMul"): [
        Sample("MatMul", (grid(3, 4), grid(4, 5, seed=1)), varying=(0, 1)),
        Sample("MatMul", (grid(2, 3, 4), grid(4, 5, seed=1)), varying=(0, 1)),
        Sample("MatMul", (grid(2, 3, 4), grid(2, 4, 5, seed=1)), varying=(0, 1)),
        Sample("MatMul", (grid(4), grid(2, 4, 5, seed=1)), varying=(0, 1)),
        Sample("MatMul", (grid(2, 3, 4), grid(4, seed=1)), varying=(0, 1)),
        Sample("MatMul", (grid(4), grid(4, seed=1)), varying=(0, 1)),
    ],
    ("", "Add"): binary("Add"),
    ("", "Sub"): binary("Sub"),
    ("", "Mul"): binary("Mul"),
    ("", "Div"): binary("Div", low=0.5),
    ("", "Concat"): [
        Sample("Concat", (grid(2, 3), grid(2, 4, seed=1)), {"axis": 1}, varying=(0, 1)),
        Sample("Concat", (grid(2, 3), grid(4, 3, seed=1), grid(1, 3, seed=2)), {"axis": 0}, varying=(0, 1)),
    ],
    ("", "Where"): [
        Sample("Where", (grid(2, 3) > 0, grid(2, 3, seed=1), grid(2, 3, seed=2)), varying=(1, 2))
    ],
    ("", "AveragePool"): [
        Sample("AveragePool", (_IMAGE,), {"kernel_shape": [2, 2], "strides": [2, 2]}),
        Sample("AveragePool", (_IMAGE,), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        Sample(
            "AveragePool", (_IMAGE,), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}
        ),
        Sample(
            "AveragePool", (_IMAGE,), {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"}
        ),
        Sample("AveragePool", (_IMAGE,), {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
        Sample(
            "AveragePool",
            (_IMAGE,),
            {"kernel_shape": [2, 2], "dilations": [2, 3], "pads": [1, 1, 1, 1]},
            opset=19,
        ),
        Sample(
            "AveragePool", (grid(1, 2, 4, 5, 4),), {"kernel_shape": [2, 2, 2], "pads": [0, 1, 0, 1, 0, 0]}
        ),
    ],
    ("", "GlobalAveragePool"): [Sample("GlobalAveragePool", (_IMAGE,))],
    ("", "LeakyRelu"): unary("LeakyRelu") + unary("LeakyRelu", alpha=0.3),
    ("", "Sigmoid"): unary("Sigmoid"),
    ("", "Softmax"): unary("Softmax") + unary("Softmax", axis=1),
    ("", "Tanh"): unary("Tanh"),
    ("", "HardSigmoid"): unary("HardSigmoid") + unary("HardSigmoid", low=-0.7, high=1.7, alpha=0.4, beta=0.3),
    ("", "HardSwish"): unary("HardSwish", low=-5.0, high=5.0),
    ("", "PRelu"): [
        Sample("PRelu", (_IMAGE, grid(3, 1, 1, low=0.1, high=0.5))),
        Sample("PRelu", (_IMAGE, f(0.25))),
    ],
    ("", "MaxPool"): [
        Sample("MaxPool", (_IMAGE,), {"kernel_shape": [2, 2], "strides": [2, 2]}),
        Sample("MaxPool", (_IMAGE,), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        Sample("MaxPool", (_IMAGE,), {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"}),
        Sample("MaxPool", (_IMAGE,), {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
        Sample("MaxPool", (_IMAGE,), {"kernel_shape": [2, 2], "dilations": [2, 2]}),
        Sample(
            "MaxPool", (_IMAGE,), {"kernel_shape": [2, 2], "strides": [2, 2], "storage_order": 1}, outputs=2
        ),
        Sample("MaxPool", (_IMAGE,), {"kernel_shape": [2, 2], "storage_order": 1}),
        Sample("MaxPool", (grid(1, 2, 4, 5, 4),), {"kernel_shape": [2, 2, 2]}),
        Sample("MaxPool", (grid(2, 3, 7),), {"kernel_shape": [3], "strides": [2]}),
    ],
    ("", "Reshape"): [
        Sample("Reshape", (grid(2, 3, 4), ints(2, 12))),
        Sample("Reshape", (grid(2, 3, 4), ints(0, -1))),
    ],
    ("", "Flatten"): [Sample("Flatten", (grid(2, 3, 4),)), Sample("Flatten", (grid(2, 3, 4),), {"axis": 2})],
    ("", "Squeeze"): [Sample("Squeeze", (grid(2, 1, 3), ints(1)))],
    ("", "Unsqueeze"): [Sample("Unsqueeze", (grid(2, 3), ints(1)))],
    ("", "Transpose"): [
        Sample("Transpose", (grid(2, 3, 4),), {"perm": [0, 2, 1]}),
        Sample("Transpose", (grid(2, 3),)),
    ],
    ("", "Slice"): [
        Sample("Slice", (grid(4, 6), ints(1), ints(5), ints(1))),
        Sample("Slice", (grid(4, 6), ints(0), ints(6), ints(1), ints(2))),
        Sample("Slice", (grid(4, 6), ints(-1, 1), ints(-9, 5), ints(0, 1), ints(-1, 2))),
    ],
    ("", "Split"): [Sample("Split", (grid(4, 6), ints(2, 4)), {"axis": 1}, outputs=2)],
    ("", "Gather"): [Sample("Gather", (grid(4, 6), ints(0, 2, 2)), {"axis": 1})],
    ("", "Expand"): [Sample("Expand", (grid(3, 1), ints(2, 3, 4)))],
    ("", "Tile"): [Sample("Tile", (grid(2, 3), ints(2, 3)))],
    ("", "Identity"): unary("Identity"),
    ("", "Pad"): [
        Sample("Pad", (grid(2, 3), ints(0, 1, 1, 0))),
        Sample("Pad", (grid(1, 2, 3, 3), ints(0, 0, 1, 1, 0, 0, 1, 1), scalar(0.5))),
        Sample("Pad", (grid(4, 5), ints(-1, 2, 1, -2))),
        Sample("Pad", (grid(4, 5), ints(1, 2), None, ints(-1)), {"mode": "edge"}, opset=19),
        Sample("Pad", (grid(4, 5), ints(2, 1), scalar(0.5), ints(1)), opset=19),
        Sample("Pad", (grid(4, 5), ints(2, 0, 1, 3)), {"mode": "reflect"}),
        Sample("Pad", (grid(4, 5), ints(2, 0, 1, 3)), {"mode": "wrap"}, opset=19),
    ],
    ("", "Resize"): [
        resize(
            (1, 1, 2, 2),
            None,
            mode="nearest",
            nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        ),
        resize((1, 1, 2, 2), None, mode="linear"),
        resize(None, (2, 3, 7, 9), mode="linear", coordinate_transformation_mode="align_corners"),
        resize(None, (2, 3, 2, 3), mode="linear", coordinate_transformation_mode="pytorch_half_pixel"),
        resize((1, 1, 1.5, 2.5), None, mode="cubic"),
        resize((1, 1, 1, 3), None, mode="nearest"),
        resize((2, 1, 1.5, 1), None, mode="nearest"),
        resize(None, (2, 6, 4, 3), mode="nearest"),
        resize((1, 1, 0.6, 0.5), None, mode="linear", antialias=1, opset=18),
        resize((0.6, 2), None, mode="linear", axes=[2, 3], opset=18),
        resize(None, (7, 9), mode="linear", axes=[3, 2], opset=18),
        resize(None, (6, 9), mode="linear", axes=[2, 3], keep_aspect_ratio_policy="not_larger", opset=18),
        resize(
            None,
            (2, 3, 3, 3),
            (0, 0, 0.2, 0.4, 1, 1, 0.9, 1.2),
            mode="linear",
            coordinate_transformation_mode="tf_crop_and_resize",
        ),
    ],
    ("", "DepthToSpace"): [
        Sample("DepthToSpace", (grid(2, 8, 3, 2),), {"blocksize": 2, "mode": m}) for m in ("DCR", "CRD")
    ],
    ("", "SpaceToDepth"): [Sample("SpaceToDepth", (grid(2, 3, 4, 6),), {"blocksize": 2})],
    ("", "Relu"): unary("Relu"),
    ("", "Clip"): [
        Sample("Clip", (grid(2, 3, 4), scalar(-1.01), scalar(0.99))),
        Sample("Clip", (grid(2, 3, 4), None, scalar(0.99))),
    ],
    ("", "BatchNormalization"): [
        Sample("BatchNormalization", (_IMAGE, *_STATISTICS), {"epsilon": 1e-3}),
        Sample("BatchNormalization", (_IMAGE, *_STATISTICS), varying=(0, 1, 2, 3, 4)),
    ],
    **{
        ("", name): unary(name)
        for name in (
            "Abs",
            "Atan",
            "Asinh",
            "Cos",
            "Cosh",
            "Erf",
            "Exp",
            "Neg",
            "Sin",
            "Sinh",
            "Softplus",
            "Softsign",
        )
    },
    ("", "Swish"): [Sample("Swish", (grid(2, 3, 4),), {"alpha": alpha}, opset=24) for alpha in (1.0, 0.5)],
    **{("", name): unary(name, low=-0.9, high=0.9) for name in ("Acos", "Asin", "Atanh", "Tan")},
    **{("", name): unary(name, low=0.5) for name in ("Log", "Reciprocal", "Sqrt")},
    ("", "Acosh"): unary("Acosh", low=1.2, high=4.0),
    ("", "Celu"): unary("Celu") + unary("Celu", alpha=0.5),
    ("", "Elu"): unary("Elu") + unary("Elu", alpha=0.5),
    ("", "Gelu"): [Sample("Gelu", (grid(2, 3, 4),), {"approximate": a}, opset=20) for a in ("none", "tanh")],
    ("", "Selu"): unary("Selu") + unary("Selu", alpha=1.5, gamma=0.9),
    ("", "Shrink"): unary("Shrink", lambd=0.53) + unary("Shrink", lambd=0.83, bias=0.2),
    ("", "ThresholdedRelu"): unary("ThresholdedRelu", alpha=0.53),
    ("", "Cast"): unary("Cast", to=onnx.TensorProto.FLOAT),
    ("", "CastLike"): [Sample("CastLike", (grid(2, 3), f(1)))],
    ("", "Mod"): [
        Sample("Mod", (grid(2, 3, seed=3), grid(2, 3, low=0.6, seed=1)), {"fmod": 1}, varying=(0, 1)),
        Sample("Mod", (grid(2, 3), f(0.45)), {"fmod": 1}),
    ],
    ("", "Pow"): [
        Sample("Pow", (grid(2, 3, low=0.5), scalar(3.0))),
        Sample("Pow", (grid(2, 3, low=0.5), scalar(2.0))),
        Sample("Pow", (grid(2, 3, low=0.5), grid(3, seed=1)), varying=(0, 1)),
        Sample("Pow", (grid(2, 3), ints(2, 3, 1))),
    ],
    **{("", name): unary(name, low=-1.9, high=2.1) for name in ("Ceil", "Floor", "Hardmax", "Round", "Sign")},
    ("", "LayerNormalization"): [
        Sample("LayerNormalization", (grid(2, 3, 4), f(1, -2, 0.5, 1), f(0, 1, 2, 3)), varying=(0, 1, 2)),
        Sample(
            "LayerNormalization", (grid(2, 3, 4), grid(3, 4, seed=1)), {"axis": 1, "epsilon": 0.1}, outputs=3
        ),
    ],
    ("", "RMSNormalization"): [
        Sample(
            "RMSNormalization", (grid(2, 3, 4), grid(3, 4, seed=1)), {"axis": 1}, varying=(0, 1), opset=23
        ),
        Sample("RMSNormalization", (grid(2, 3, 4), f(1, -2, 0.5, 1)), {"epsilon": 0.1}, opset=23),
    ],
    ("", "SimplifiedLayerNormalization"): [
        Sample("SimplifiedLayerNormalization", (grid(2, 3, 4), f(1, -2, 0.5, 1)), {"axis": -1})
    ],
    ("", "InstanceNormalization"): [
        Sample(
            "InstanceNormalization", (_IMAGE, f(1, -2, 0.5), f(0, 1, 2)), {"epsilon": 1e-3}, varying=(0, 1, 2)
        ),
        Sample("InstanceNormalization", (grid(2, 3, 5), f(1, -2, 0.5), f(0, 1, 2))),
    ],
    ("", "GroupNormalization"): [
        Sample(
            "GroupNormalization",
            (grid(2, 4, 3, 2), grid(4, seed=1), grid(4, seed=2)),
            {"num_groups": 2},
            varying=(0, 1, 2),
            opset=21,
        ),
        Sample(
            "GroupNormalization",
            (grid(2, 6, 3), grid(3, seed=1), grid(3, seed=2)),
            {"num_groups": 3, "epsilon": 0.1},
            opset=18,
        ),
    ],
    ("", "LpNormalization"): unary("LpNormalization") + unary("LpNormalization", p=1, axis=1),
    ("", "LRN"): [
        Sample("LRN", (grid(2, 5, 3, 2),), {"size": 3, "alpha": 0.5}),
        Sample("LRN", (grid(2, 5, 3, 2),), {"size": 5, "alpha": 0.3, "beta": 0.6, "bias": 2.0}),
    ],
    ("", "MeanVarianceNormalization"): [
        Sample("MeanVarianceNormalization", (_IMAGE,)),
        Sample("MeanVarianceNormalization", (_IMAGE,), {"axes": [2, 3]}),
    ],
    ("", "LogSoftmax"): unary("LogSoftmax", axis=1),
    ("", "Mish"): [Sample("Mish", (grid(2, 3, 4),), opset=18)],
    ("", "Sum"): [
        Sample("Sum", (grid(2, 3), grid(2, 3, seed=1), grid(3, seed=2)), varying=(0, 1, 2)),
        Sample("Sum", (grid(2, 3),)),
    ],
    ("", "Mean"): [
        Sample("Mean", (grid(2, 3), grid(2, 3, seed=1)), varying=(0, 1)),
        Sample("Mean", (grid(2, 3), grid(3, seed=1)), varying=(0, 1)),
    ],
    **{
        ("", name): [
            Sample(name, (grid(2, 3), grid(2, 3, seed=1)), varying=(0, 1)),
            Sample(name, (grid(2, 3), grid(3, seed=1), grid(2, 1, seed=2)), varying=(0, 1, 2)),
            Sample(name, (grid(2, 3),)),
        ]
        for name in ("Min", "Max")
    },
    **{
        ("", name): reduction(name)
        for name in (
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSumSquare",
        )
    },
    ("", "ReduceLogSum"): reduction("ReduceLogSum", low=0.5),
    ("", "ReduceSum"): [
        Sample("ReduceSum", (grid(2, 3, 4), ints(1)), {"keepdims": 0}),
        Sample("ReduceSum", (grid(2, 3, 4), ints(0, -1))),
        Sample("ReduceSum", (grid(2, 3, 4), ints()), {"noop_with_empty_axes": 1}),
    ],
    ("", "CumSum"): [
        Sample("CumSum", (grid(2, 3, 4), np.array(axis)), attributes)
        for axis, attributes in (
            (0, {}),
            (1, {"exclusive": 1}),
            (-1, {"reverse": 1}),
            (2, {"exclusive": 1, "reverse": 1}),
        )
    ]
    + [
        Sample("CumSum", (grid(2, 600, 3), np.array(1)), attributes)
        for attributes in ({}, {"exclusive": 1}, {"reverse": 1}, {"exclusive": 1, "reverse": 1})
    ],
    ("", "Einsum"): [
        einsum("bij,bjk->bik", (2, 3, 4), (2, 4, 5)),
        einsum("bhid,bhjd->bhij", (2, 2, 3, 4), (2, 2, 5, 4)),
        einsum("...ij,jk->...ik", (2, 3, 2, 4), (4, 3)),
        einsum("ij,jk,kl", (2, 3), (3, 4), (4, 2)),
        einsum("ii->i", (3, 3)),
        einsum("bii", (2, 3, 3)),
        einsum("ijk->ik", (2, 3, 4)),
        einsum("i,j->ij", (3,), (4,)),
        einsum("ij,kj->", (2, 3), (4, 3)),
    ],
    ("", "AffineGrid"): [
        Sample("AffineGrid", (grid(2, 2, 3), ints(2, 3, 4, 5)), {"align_corners": 1}, opset=20),
        Sample("AffineGrid", (grid(2, 3, 4), ints(2, 3, 4, 2, 3)), opset=20),
    ],
    ("", "CenterCropPad"): [
        Sample("CenterCropPad", (grid(3, 4, 5), ints(5, 3, 5)), opset=18),
        Sample("CenterCropPad", (grid(3, 4), ints(1)), {"axes": [1]}, opset=18),
    ],
    ("", "Col2Im"): [
        Sample("Col2Im", (grid(1, 8, 12), ints(4, 5), ints(2, 2)), opset=18),
        Sample(
            "Col2Im",
            (grid(2, 4, 9), ints(5, 6), ints(2, 2)),
            {"strides": [2, 2], "pads": [1, 0, 0, 1]},
            opset=18,
        ),
        Sample(
            "Col2Im",
            (grid(1, 6, 6), ints(5, 6), ints(2, 3)),
            {"dilations": [2, 2], "strides": [1, 1], "pads": [0, 0, 0, 0]},
            opset=18,
        ),
        Sample("Col2Im", (grid(2, 6, 4), ints(5), ints(2)), opset=18),
    ],
    ("", "Compress"): [
        Sample("Compress", (grid(3, 4), np.array([True, False, True])), {"axis": 0}),
        Sample("Compress", (grid(3, 4), np.array([False, True, True, False, True]))),
    ],
    ("", "Dropout"): [
        Sample("Dropout", (grid(2, 3),)),
        Sample("Dropout", (grid(2, 3), scalar(0.3), np.array(False)), outputs=2),
    ],
    ("", "GatherElements"): [
        Sample("GatherElements", (grid(3, 4), np.array([[0, 2, 1, 1], [2, 2, 0, -1]])), {"axis": 0})
    ],
    ("", "GatherND"): [
        Sample("GatherND", (grid(3, 4, 2), np.array([[0, 1], [2, 3], [0, 1]]))),
        Sample("GatherND", (grid(2, 3, 4), np.array([[1], [2]])), {"batch_dims": 1}),
    ],
    **{
        ("", name): [Sample(name, (_IMAGE,)), Sample(name, (grid(2, 3, 5),))]
        for name in ("GlobalMaxPool", "GlobalLpPool")
    },
    ("", "GridSample"): [
        Sample(
            "GridSample",
            (_IMAGE, grid(2, 4, 3, 2, low=-1.3, high=1.3, seed=1)),
            {"mode": m, "padding_mode": p, "align_corners": a},
            varying=(0, 1),
            opset=20,
        )
        for m, p, a in (
            ("linear", "zeros", 0),
            ("linear", "border", 1),
            ("linear", "reflection", 0),
            ("linear", "reflection", 1),
            ("nearest", "zeros", 0),
            ("cubic", "zeros", 0),
            ("cubic", "border", 1),
            ("cubic", "reflection", 0),
        )
    ]
    + [
        Sample(
            "GridSample",
            (grid(1, 2, 3, 4, 3), grid(1, 2, 2, 2, 3, low=-1.2, high=1.2, seed=1)),
            varying=(0, 1),
            opset=20,
        )
    ],
    ("", "LpPool"): [
        Sample("LpPool", (_IMAGE,), {"kernel_shape": [2, 2], "strides": [2, 2]}),
        Sample("LpPool", (_IMAGE,), {"kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "p": 3}),
        Sample("LpPool", (_IMAGE,), {"kernel_shape": [2, 2], "dilations": [2, 2], "p": 1}, opset=18),
        Sample("LpPool", (_IMAGE,), {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ],
    ("", "MaxUnpool"): [
        Sample(
            "MaxUnpool",
            (grid(1, 1, 2, 2), np.array([[[[5, 7], [13, 15]]]])),
            {"kernel_shape": [2, 2], "strides": [2, 2]},
        ),
    ],
    ("", "OneHot"): [
        Sample("OneHot", (np.array([[0, 2], [1, 3]]), np.array(4), f(-1, 2)), {"axis": a}, varying=(2,))
        for a in (-1, 0)
    ],
    ("", "ReverseSequence"): [
        Sample("ReverseSequence", (grid(4, 3, 2), ints(1, 4, 3))),
        Sample("ReverseSequence", (grid(3, 4), ints(2, 1, 4)), {"batch_axis": 0, "time_axis": 1}),
    ],
    ("", "RoiAlign"): [
        Sample(
            "RoiAlign",
            (grid(2, 3, 8, 9), _ROIS, ints(0, 1)),
            {"output_height": 2, "output_width": 3, "sampling_ratio": 2, "spatial_scale": 0.5, **more},
        )
        for more in ({}, {"mode": "max"}, {"coordinate_transformation_mode": "output_half_pixel"})
    ],
    ("", "ScatterElements"): [
        Sample(
            "ScatterElements",
            (grid(3, 4), np.array([[1, 0, 2, 1]]), grid(1, 4, seed=1)),
            {"axis": 0},
            varying=(0, 2),
        ),
        Sample(
            "ScatterElements",
            (grid(2, 4), np.array([[1, 1, -1], [0, 2, 2]]), grid(2, 3, seed=1)),
            {"axis": 1, "reduction": "add"},
            varying=(0, 2),
        ),
    ],
    ("", "ScatterND"): [
        Sample("ScatterND", (grid(3, 4), np.array([[0], [2]]), grid(2, 4, seed=1)), varying=(0, 2)),
        Sample(
            "ScatterND",
            (grid(3, 4), np.array([[0, 1], [0, 1], [2, 2]]), grid(3, seed=1)),
            {"reduction": "add"},
            varying=(0, 2),
        ),
    ],
    ("", "TopK"): [
        Sample("TopK", (grid(3, 5), ints(2)), outputs=2),
        Sample("TopK", (grid(3, 5), ints(3)), {"axis": 0, "largest": 0}, outputs=2),
    ],
    ("", "Trilu"): [
        Sample("Trilu", (grid(2, 4, 4),), {"upper": 0}),
        Sample("Trilu", (grid(3, 4), np.array(1))),
    ],
    ("", "ArgMax"): [Sample("ArgMax", (grid(3, 5),), {"axis": 1}, differentiable=())],
    ("", "ArgMin"): [Sample("ArgMin", (grid(3, 5),), {"axis": 0, "keepdims": 0}, differentiable=())],
    ("", "NonZero"): [Sample("NonZero", (grid(3, 5) * (grid(3, 5, seed=1) > 0),), differentiable=())],
    ("", "NonMaxSuppression"): [
        Sample(
            "NonMaxSuppression",
            (
                np.sort(grid(1, 6, 4, low=0, high=1), axis=2),
                grid(1, 2, 6, low=0, high=1),
                np.array([3]),
                f(0.5),
                f(0.1),
            ),
            varying=(0, 1),
            differentiable=(),
        )
    ],
    ("", "Bernoulli"): [Sample("Bernoulli", (grid(3, 5, low=0, high=1),), {"seed": 1.0}, differentiable=())],
    ("", "Multinomial"): [
        Sample("Multinomial", (grid(3, 5),), {"seed": 1.0, "sample_size": 4}, differentiable=())
    ],
    **{
        ("", name): [Sample(name, (grid(3, 5),), {"seed": 1.0}, differentiable=())]
        for name in ("RandomNormalLike", "RandomUniformLike")
    },
    **{
        ("", name): [Sample(name, (), {"seed": 1.0, "shape": [3, 5]}, varying=())]
        for name in ("RandomNormal", "RandomUniform")
    },
    ("", "Unique"): [Sample("Unique", (grid(6),), outputs=4), Sample("Unique", (grid(3, 2),), {"axis": 0})],
    ("", "Upsample"): [
        Sample("Upsample", (_IMAGE, f(1, 1, 2, 1.5)), {"mode": m}, opset=9) for m in ("nearest", "linear")
    ],
    ("", "RNN"): [
        recurrent("RNN", 1),
        recurrent("RNN", 1, 2, activations=["Elu", "LeakyRelu"], activation_alpha=[0.7, 0.1]),
        recurrent("RNN", 1, activations=["ScaledTanh"], activation_alpha=[0.7], activation_beta=[1.1]),
        recurrent("RNN", 1, direction="reverse", lengths=(4, 2, 3), clip=0.9),
    ],
    ("", "GRU"): [
        recurrent("GRU", 3),
        recurrent("GRU", 3, 2, linear_before_reset=1, lengths=(4, 2, 3)),
        recurrent(
            "GRU",
            3,
            bias=False,
            activations=["HardSigmoid", "Softsign"],
            activation_alpha=[0.3],
            activation_beta=[0.4],
        ),
    ],
    ("", "LSTM"): [
        recurrent("LSTM", 4),
        recurrent("LSTM", 4, 2, lengths=(4, 2, 3), states=True),
        recurrent("LSTM", 4, peepholes=True, states=True, input_forget=1),
        recurrent("LSTM", 4, direction="reverse", bias=False, clip=0.8),
    ],
    ("", "NegativeLogLikelihoodLoss"): [
        Sample("NegativeLogLikelihoodLoss", (grid(3, 4), ints(0, 3, 1))),
        Sample(
            "NegativeLogLikelihoodLoss",
            (grid(2, 3, 2), np.array([[0, 2], [1, 0]]), f(1, 2, 0.5)),
            {"ignore_index": 2},
            varying=(0, 2),
        ),
        Sample("NegativeLogLikelihoodLoss", (grid(3, 4), ints(0, 3, 1)), {"reduction": "none"}),
    ],
    ("", "SoftmaxCrossEntropyLoss"): [
        Sample("SoftmaxCrossEntropyLoss", (grid(3, 4), ints(0, 3, 1)), outputs=2),
        Sample("SoftmaxCrossEntropyLoss", (grid(3, 4), ints(0, 3, 1), f(1, 2, 3, 4)), {"reduction": "sum"}),
    ],
    # onnxruntime's own
    (MS, "Gelu"): [ms("Gelu", grid(2, 3, 4))],
    (MS, "QuickGelu"): [ms("QuickGelu", grid(2, 3, 4)), ms("QuickGelu", grid(2, 3, 4), alpha=1.0)],
    (MS, "FastGelu"): [
        ms("FastGelu", grid(2, 3, 4)),
        ms("FastGelu", grid(2, 3, 4), grid(4, seed=1), varying=(0, 1)),
    ],
    (MS, "BiasGelu"): [ms("BiasGelu", grid(2, 3, 4), grid(4, seed=1), varying=(0, 1))],
    (MS, "SkipLayerNormalization"): [
        ms(
            "SkipLayerNormalization",
            *_SKIP,
            grid(4, seed=2),
            grid(4, seed=3),
            grid(4, seed=4),
            varying=(0, 1, 2, 3, 4),
            epsilon=1e-5,
        ),
        ms("SkipLayerNormalization", *_SKIP, grid(4, seed=2), epsilon=0.1),
    ],
    (MS, "SkipSimplifiedLayerNormalization"): [
        ms("SkipSimplifiedLayerNormalization", *_SKIP, grid(4, seed=2), varying=(0, 1, 2), epsilon=1e-5),
    ],
    (MS, "FusedMatMul"): [
        ms("FusedMatMul", grid(2, 3, 4), grid(2, 5, 4, seed=1), varying=(0, 1), transB=1, alpha=0.5),
        ms("FusedMatMul", grid(2, 4, 3), grid(2, 4, 5, seed=1), varying=(0, 1), transA=1),
        ms("FusedMatMul", grid(3, 2, 4), grid(2, 4, 5, seed=1), varying=(0, 1), transBatchA=1),
    ],
    (MS, "FusedConv"): [
        ms(
            "FusedConv",
            _IMAGE,
            grid(4, 3, 3, 3, seed=1),
            grid(4, seed=2),
            activation="Relu",
            pads=[1, 1, 1, 1],
        ),
        ms(
            "FusedConv",
            _IMAGE,
            grid(4, 3, 1, 1, seed=1),
            activation="HardSigmoid",
            activation_params=[0.2, 0.5],
        ),
        ms("FusedConv", _IMAGE, grid(4, 3, 1, 1, seed=1), activation="Clip", activation_params=[-0.5, 0.7]),
        ms("FusedConv", _IMAGE, grid(4, 3, 1, 1, seed=1), activation="LeakyRelu", activation_params=[0.2]),
    ],
    (MS, "FusedGemm"): [
        ms(
            "FusedGemm",
            grid(3, 4),
            grid(5, 4, seed=1),
            grid(5, seed=2),
            varying=(0, 1, 2),
            transB=1,
            activation="LeakyRelu",
            activation_alpha=0.1,
        ),
        ms("FusedGemm", grid(3, 4), grid(4, 5, seed=1), grid(5, seed=2), activation="Tanh"),
    ],
    (MS, "Attention"): [
        ms("Attention", *_QKV, varying=(0, 1, 2), num_heads=2),
        ms("Attention", *_QKV, num_heads=2, unidirectional=1),
        ms("Attention", *_QKV, np.array([[1, 1, 0], [1, 1, 1]], np.int32), num_heads=2),
        ms("Attention", *_QKV, np.array([2, 3], np.int32), num_heads=2, scale=0.3),
        ms("Attention", *_QKV, None, None, grid(2, 2, 3, 3, seed=5), varying=(0, 5), num_heads=2),
    ],
    (MS, "MultiHeadAttention"): [
        ms("MultiHeadAttention", *(grid(2, n, 4, seed=n) for n in (3, 5, 5)), varying=(0, 1, 2), num_heads=2),
        ms(
            "MultiHeadAttention",
            *(grid(2, 3, 4, seed=n) for n in range(3)),
            grid(12, seed=4),
            np.array([[1, 1, 0], [1, 1, 1]], np.int32),
            num_heads=2,
        ),
    ],
    # The quantizers' gradients are straight-through, not those of a staircase: they have tests of their own.
    ("", "QuantizeLinear"): [
        Sample(
            "QuantizeLinear",
            (grid(2, 3), np.array(0.2, np.float32), np.array(7, np.uint8)),
            differentiable=(),
        )
    ],
    ("", "DequantizeLinear"): [
        Sample(
            "DequantizeLinear",
            (np.arange(6, dtype=np.uint8).reshape(2, 3), np.array(0.2, np.float32), np.array(7, np.uint8)),
            differentiable=(),
        )
    ],
    ("", "DynamicQuantizeLinear"): [
        Sample("DynamicQuantizeLinear", (grid(2, 3),), outputs=3, differentiable=())
    ],
    (LSQ_DOMAIN, "FakeQuant"): [
        Sample(
            "FakeQuant",
            (grid(2, 3, 4), f(0.2), f(7)),
            {"quant_min": 0, "quant_max": 15},
            varying=(0, 1),
            outputs=2,
            domain=LSQ_DOMAIN,
            differentiable=(),
        )
    ],
}
