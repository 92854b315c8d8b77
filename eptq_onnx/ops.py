"""One row an operator: what is quantizable about it, and how it gets a gradient.

A new operator is one new row here (and its samples in ``tests/op_samples.py``). An operator without a row is no
error: it stays float, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from onnx import ModelProto, NodeProto

from eptq_onnx.graph import channel_axes, channels, replay
from eptq_onnx.graph.branches import flattened
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.lower import (
    Lowering,
    activations,
    attention,
    fused,
    losses,
    moves,
    norms,
    pools,
    products,
    quantizers,
    recurrent,
    reductions,
    sampling,
)
from eptq_onnx.graph.view import STOP, GraphView, attribute, int_attribute, ints_attribute
from eptq_onnx.numerics.linear import ConvForm, LinearForm, MatrixForm

Bounds = tuple[float, float]

LSQ_DOMAIN = "com.microsoft"
"""`FakeQuant` of this domain (x, scale, zero_point → y, mask) is the quantizer that engines differentiate: straight
through for x inside the range, the LSQ rule (Esser et al. 2020) for the scale."""


class Role(Enum):
    """What an operator does to quantized values."""

    LAYER = "has a constant weight; the bulk of the arithmetic"
    ARITHMETIC = "computes new values; runs on integers if the target has a kernel"
    EQUAL_SCALE = "moves or selects values; input and output share one scale"
    CLIPPING = "cuts values off; absorbed by the quantizer behind it"
    FLOAT = "stays in floating point"


class Gradient(Enum):
    """Where an operator's gradient comes from."""

    ENGINE = "the gradient engine has a rule"
    LOWERED = "the node is rewritten into operators with a rule"
    ZERO = "constant almost everywhere: its gradient is 0, and not that of the identity; engines stop there"
    NONE = "no gradient: what lies before it is optimized on its own outputs only"


def _welcome(node: NodeProto, view: GraphView) -> str | None:
    """No objection."""
    return None


@dataclass(frozen=True)
class OpSpec:
    """A row of the operator table.

    Parameters
    ----------
    role : Role
    data : tuple of int or None
        Positions of the inputs that carry activations; None for all inputs.
    weight, bias : int or None
        Positions of a layer's constant inputs.
    weight_axis : callable
        Node to output-channel axis of the weight.
    grouped_axis : bool
        True if ``weight_axis`` holds the output channels of one group only (ConvTranspose).
    output_axis : int or None
        Channel axis of what the operator makes, and of the activations that it reads; None where it says nothing.
    axis : callable or None
        How a channel axis goes through the node (`eptq_onnx.graph.channel_axes`); None where it ends there. Through
        functions of single elements it always goes.
    linear : callable or None
        (node, view) to the layer as a matrix product; None where it is none.
    table : callable or None
        Node to position of the input whose rows (axis 0) it looks up; None where it does not.
    lowering : Lowering or None
    gradient : Gradient
    rearranges : bool
        True if the output holds every element of the inputs, in another order or shape.
    elementwise : bool
        True if every output element depends on the input elements at its place only.
    bounds : callable or None
        (node, view) to the limits of the output; None where there is none.
    channels : callable or None
        What factors on the channels of its tensors do to the node (`eptq_onnx.graph.channels`); None where nobody can tell.
    mixes : bool
        True if that holds for any invertible matrix over the channels, too: it does the same to all, and is linear.
    recorded : replay.Recorded or None
        What of it is recorded from the float network and replayed, if it draws random numbers or chooses by value.
    objection : callable
        (node, view) to a reason why this node, unlike its siblings, must stay float; or None.
    """

    role: Role = Role.FLOAT
    data: tuple[int, ...] | None = (0,)
    weight: int | None = None
    bias: int | None = None
    weight_axis: Callable[[NodeProto], int] = lambda node: 0
    grouped_axis: bool = False
    output_axis: int | None = None
    axis: channel_axes.Rule | None = None
    linear: Callable[[NodeProto, GraphView], LinearForm | None] | None = None
    table: Callable[[NodeProto], int | None] | None = None
    lowering: Lowering | None = None
    gradient: Gradient = Gradient.ENGINE
    rearranges: bool = False
    elementwise: bool = False
    bounds: Callable[[NodeProto, GraphView], Bounds] | None = None
    channels: channels.Rule | None = None
    mixes: bool = False
    recorded: replay.Recorded | None = None
    objection: Callable[[NodeProto, GraphView], str | None] = _welcome

    def data_inputs(self, node: NodeProto) -> list[str]:
        """Names of the inputs that carry activations."""
        positions = range(len(node.input)) if self.data is None else self.data
        return [node.input[i] for i in positions if i < len(node.input) and node.input[i]]


# ---- details of single rows ------------------------------------------------------------------------------------
def _unit(node: NodeProto, view: GraphView) -> Bounds:
    return 0.0, 1.0


def _positive(node: NodeProto, view: GraphView) -> Bounds:
    return 0.0, float(np.inf)


def _clip_bounds(node: NodeProto, view: GraphView) -> Bounds:
    """Limits of Clip: attributes before opset 11, inputs after; infinite where absent."""
    limits = []
    for position, name, default in ((1, "min", -np.inf), (2, "max", np.inf)):
        if len(node.input) > position and node.input[position]:
            if not view.is_constant(node.input[position]):
                return float(-np.inf), float(np.inf)
            limits.append(float(view.constant(node.input[position]).reshape(-1)[0]))
        else:
            limits.append(float(attribute(node, name, default)))  # type: ignore[arg-type]
    return limits[0], limits[1]


def _clip_objection(node: NodeProto, view: GraphView) -> str | None:
    if any(i and not view.is_constant(i) for i in node.input[1:]):
        return "its limits are computed at run time"
    return None


def _conv_objection(node: NodeProto, view: GraphView) -> str | None:
    # onnxruntime runs it on floats.
    weight = node.input[1]
    return "it has no spatial axes" if view.is_constant(weight) and len(view.constant_shape(weight)) == 2 else None


def _gemm_objection(node: NodeProto, view: GraphView) -> str | None:
    if int_attribute(node, "transA", 0):
        return "transA is set"
    if float(attribute(node, "beta", 1.0)) != 1.0:  # type: ignore[arg-type]
        return "beta is not 1"
    return None


def _matmul_objection(node: NodeProto, view: GraphView) -> str | None:
    if view.is_constant(node.input[0]):
        return "its left operand is the constant"
    return None


def _resize_objection(node: NodeProto, view: GraphView) -> str | None:
    if attribute(node, "mode", "nearest") != "nearest":
        return f"{attribute(node, 'mode')} interpolation makes values between the integers"
    return None


def _maxpool_objection(node: NodeProto, view: GraphView) -> str | None:
    return "its indices are used" if len(node.output) > 1 and node.output[1] else None


def _averagepool_objection(node: NodeProto, view: GraphView) -> str | None:
    return "integer kernels know no dilations" if attribute(node, "dilations") is not None else None


def _pad_objection(node: NodeProto, view: GraphView) -> str | None:
    if len(node.input) > 2 and node.input[2] and not view.is_constant(node.input[2]):
        return "its fill value is computed at run time"
    return None


def _conv_form(node: NodeProto, view: GraphView) -> ConvForm:
    shape = view.constant_shape(node.input[1])
    rank = len(shape) - 2
    return ConvForm(
        kernel=shape[2:],
        strides=tuple(ints_attribute(node, "strides")) or (1,) * rank,
        dilations=tuple(ints_attribute(node, "dilations")) or (1,) * rank,
        pads=tuple(ints_attribute(node, "pads")) or None,
        auto_pad=str(attribute(node, "auto_pad", "NOTSET")),
        group=int_attribute(node, "group", 1),
    )


def _conv_transpose_form(node: NodeProto, view: GraphView) -> ConvForm | None:
    if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID") or attribute(node, "output_shape") is not None:
        return None
    return replace(_conv_form(node, view), transposed=True, output_padding=tuple(ints_attribute(node, "output_padding")))


def _gemm_form(node: NodeProto, view: GraphView) -> MatrixForm:
    return MatrixForm(bool(int_attribute(node, "transB", 0)), float(attribute(node, "alpha", 1.0)))  # type: ignore[arg-type]


def _matmul_form(node: NodeProto, view: GraphView) -> MatrixForm | None:
    return MatrixForm() if len(view.constant_shape(node.input[1])) == 2 else None


def _rows_looked_up(node: NodeProto) -> int | None:
    return 0 if int_attribute(node, "axis", 0) == 0 else None


def _layer_channels(node: NodeProto, slots: channels.Channels) -> bool:
    """See `eptq_onnx.graph.channels.layer`."""
    spec = spec_of(node)
    form = linear_form(node, slots.view) if slots.view.is_constant(node.input[spec.weight or 0]) else None
    axis = 0 if spec.output_axis is None else spec.output_axis
    return form is not None and channels.layer(node, slots, form, spec.weight or 0, spec.bias, axis)


def _clip_channels(node: NodeProto, slots: channels.Channels) -> bool:
    """Limits other than 0 and infinity are not the same for scaled channels."""
    return (
        _clip_objection(node, slots.view) is None
        and set(_clip_bounds(node, slots.view)) <= {0.0, -np.inf, np.inf}
        and channels.passes(node, slots)
    )


def _lowered(rule: Lowering, role: Role = Role.FLOAT, **options: object) -> OpSpec:
    return OpSpec(role, lowering=rule, gradient=Gradient.LOWERED, **options)  # type: ignore[arg-type]


def _function(rule: Lowering, role: Role = Role.FLOAT, **options: object) -> OpSpec:
    """A function of single elements, made of others."""
    return _lowered(rule, role, elementwise=True, **options)


def _kept(rule: Lowering, role: Role = Role.FLOAT, **options: object) -> OpSpec:
    """Channels stay where they are."""
    return _lowered(rule, role, axis=channel_axes.keeps, **options)


def _image(rule: Lowering, role: Role = Role.FLOAT, **options: object) -> OpSpec:
    """Reads and makes images or volumes, channels along axis 1."""
    return _lowered(rule, role, output_axis=1, **options)


def _features(rule: Lowering, **options: object) -> OpSpec:
    """Reads and makes rows of features."""
    return _lowered(rule, Role.FLOAT, output_axis=-1, **options)


def _normalized(rule: Lowering) -> OpSpec:
    """Normalizes rows of features."""
    return _features(rule, axis=channel_axes.keeps, channels=channels.last_axis_normalization)


def _reshapes(axis: channel_axes.Rule) -> OpSpec:
    return OpSpec(Role.EQUAL_SCALE, rearranges=True, channels=channels.reshape, mixes=True, axis=axis)


_MOVES = OpSpec(Role.EQUAL_SCALE, axis=channel_axes.keeps)
_FLOAT = OpSpec()
_DRAW = OpSpec(gradient=Gradient.NONE, axis=channel_axes.keeps, recorded=replay.Recorded(draws=True))
_CHOICE = OpSpec(gradient=Gradient.NONE, recorded=replay.Recorded(draws=False))
_ROWS = OpSpec(gradient=Gradient.NONE, recorded=replay.Recorded(draws=False, orders=True))
_SIZES = replay.Recorded(draws=False, applies=replay.rounds_sizes)
_ZERO = OpSpec(gradient=Gradient.ZERO, axis=channel_axes.keeps)
_MS = "com.microsoft"

TABLE: dict[tuple[str, str], OpSpec] = {
    # layers
    ("", "Conv"): OpSpec(
        Role.LAYER,
        weight=1,
        bias=2,
        output_axis=1,
        linear=_conv_form,
        objection=_conv_objection,
        channels=_layer_channels,
        mixes=True,
        lowering=pools.explicit_padding,
    ),
    ("", "ConvTranspose"): OpSpec(
        Role.LAYER,
        weight=1,
        bias=2,
        output_axis=1,
        weight_axis=lambda node: 1,
        grouped_axis=True,
        linear=_conv_transpose_form,
        channels=_layer_channels,
        mixes=True,
        lowering=pools.explicit_transposed_padding,
    ),
    ("", "Gemm"): OpSpec(
        Role.LAYER,
        weight=1,
        bias=2,
        output_axis=1,
        weight_axis=lambda node: 0 if int_attribute(node, "transB", 0) else 1,
        linear=_gemm_form,
        channels=_layer_channels,
        mixes=True,
        objection=_gemm_objection,
    ),
    ("", "MatMul"): OpSpec(
        Role.LAYER,
        data=(0, 1),
        weight=1,
        weight_axis=lambda node: -1,
        output_axis=-1,
        axis=channel_axes.stacked,
        linear=_matmul_form,
        channels=_layer_channels,
        mixes=True,
        objection=_matmul_objection,
        lowering=products.matmul,
    ),
    # arithmetic that some runtimes do on integers
    **{("", name): OpSpec(Role.ARITHMETIC, data=None, elementwise=True, channels=channels.sums, mixes=True) for name in ("Add", "Sub")},
    ("", "Mul"): OpSpec(Role.ARITHMETIC, data=None, elementwise=True, channels=channels.multiplied),
    ("", "Div"): OpSpec(Role.ARITHMETIC, data=None, elementwise=True, channels=channels.divided),
    ("", "Concat"): OpSpec(
        Role.ARITHMETIC, data=None, rearranges=True, channels=channels.concatenation, mixes=True, axis=channel_axes.keeps
    ),
    ("", "Where"): OpSpec(Role.ARITHMETIC, data=(1, 2), axis=channel_axes.keeps),
    ("", "AveragePool"): OpSpec(
        Role.ARITHMETIC,
        lowering=pools.average_pool,
        objection=_averagepool_objection,
        channels=channels.pools,
        mixes=True,
        output_axis=1,
    ),
    ("", "GlobalAveragePool"): OpSpec(Role.ARITHMETIC, channels=channels.pools, mixes=True, output_axis=1),
    ("", "LeakyRelu"): OpSpec(Role.ARITHMETIC, elementwise=True, channels=channels.passes),
    ("", "Sigmoid"): OpSpec(Role.ARITHMETIC, elementwise=True, bounds=_unit),
    ("", "Softmax"): OpSpec(Role.ARITHMETIC, bounds=_unit, axis=channel_axes.keeps),
    ("", "Tanh"): OpSpec(Role.ARITHMETIC, elementwise=True),
    ("", "HardSigmoid"): _function(activations.hard_sigmoid, Role.ARITHMETIC, bounds=_unit),
    ("", "HardSwish"): _function(activations.hard_swish, Role.ARITHMETIC),
    ("", "PRelu"): _function(activations.prelu, Role.ARITHMETIC, data=(0, 1), channels=channels.passes),
    # values move, the scale stays
    ("", "MaxPool"): OpSpec(
        Role.EQUAL_SCALE, lowering=pools.max_pool, objection=_maxpool_objection, channels=channels.pools, output_axis=1
    ),
    **{("", name): _reshapes(channel_axes.reshaped) for name in ("Reshape", "Flatten")},
    **{("", name): _reshapes(channel_axes.squeezed) for name in ("Squeeze", "Unsqueeze")},
    ("", "Transpose"): OpSpec(Role.EQUAL_SCALE, rearranges=True, channels=channels.transpose, mixes=True, axis=channel_axes.transposed),
    ("", "Identity"): OpSpec(Role.EQUAL_SCALE, rearranges=True, channels=channels.passes, mixes=True, axis=channel_axes.keeps),
    ("", "Gather"): OpSpec(Role.EQUAL_SCALE, table=_rows_looked_up, axis=channel_axes.gathered),
    **{("", name): _MOVES for name in ("GatherElements", "GatherND", "Expand", "Tile")},
    ("", "Slice"): OpSpec(Role.EQUAL_SCALE, lowering=moves.slices, axis=channel_axes.keeps),
    ("", "Split"): _kept(moves.split, Role.EQUAL_SCALE, channels=channels.split, mixes=True),
    ("", "Pad"): OpSpec(
        Role.EQUAL_SCALE, objection=_pad_objection, lowering=moves.pad, channels=channels.pads, mixes=True, axis=channel_axes.keeps
    ),
    **{
        ("", name): _kept(sampling.resize, Role.EQUAL_SCALE, objection=_resize_objection, channels=channels.keeps_channels, mixes=True)
        for name in ("Resize", "Upsample")
    },
    ("", "DepthToSpace"): _image(moves.depth_to_space, Role.EQUAL_SCALE, rearranges=True),
    ("", "SpaceToDepth"): _image(moves.space_to_depth, Role.EQUAL_SCALE, rearranges=True),
    ("", "CenterCropPad"): _kept(moves.centre_crop_pad, Role.EQUAL_SCALE),
    ("", "Compress"): _kept(
        moves.compress, Role.EQUAL_SCALE, recorded=replay.Recorded(False, inputs=(1,), orders=True, applies=replay.decides)
    ),
    ("", "Dropout"): _kept(
        activations.dropout,
        Role.EQUAL_SCALE,
        rearranges=True,
        channels=channels.passes,
        mixes=True,
        recorded=replay.Recorded(draws=True, outputs=(1,), rest=replay.dropout_values, applies=replay.trains),
    ),
    ("", "ReverseSequence"): _kept(moves.reverse_sequence, Role.EQUAL_SCALE, rearranges=True),
    ("", "Trilu"): _kept(moves.trilu, Role.EQUAL_SCALE),
    # choices by value, and random numbers
    ("", "TopK"): _kept(reductions.top_k, recorded=replay.Recorded(draws=False, outputs=(1,), rest=replay.top_k_values, orders=True)),
    ("", "Unique"): _lowered(
        moves.unique, recorded=replay.Recorded(draws=False, outputs=(1, 2, 3), rest=replay.unique_values, orders=True)
    ),
    **{("", name): _CHOICE for name in ("ArgMax", "ArgMin")},
    **{("", name): _ROWS for name in ("NonMaxSuppression", "NonZero")},
    ("", "Hardmax"): OpSpec(gradient=Gradient.ZERO, axis=channel_axes.keeps, recorded=replay.Recorded(draws=False)),
    **{("", name): _DRAW for name in replay.RANDOM},
    # clipping
    ("", "Relu"): OpSpec(Role.CLIPPING, elementwise=True, bounds=_positive, channels=channels.passes),
    ("", "Clip"): OpSpec(Role.CLIPPING, elementwise=True, bounds=_clip_bounds, objection=_clip_objection, channels=_clip_channels),
    # float functions of single elements
    **{("", name): OpSpec(elementwise=True) for name in ("Abs", "Cos", "Erf", "Exp", "Log", "Neg", "Reciprocal", "Sin", "Sqrt")},
    ("", "Acos"): _function(activations.acos),
    ("", "Acosh"): _function(activations.acosh),
    ("", "Asin"): _function(activations.asin),
    ("", "Asinh"): _function(activations.asinh),
    ("", "Atan"): _function(activations.atan),
    ("", "Atanh"): _function(activations.atanh),
    ("", "Celu"): _function(activations.celu),
    ("", "Cosh"): _function(activations.cosh),
    ("", "Elu"): _function(activations.elu),
    ("", "Gelu"): _function(activations.gelu),
    ("", "Mish"): _function(activations.mish),
    ("", "Selu"): _function(activations.selu),
    ("", "Shrink"): _function(activations.shrink),
    ("", "Sinh"): _function(activations.sinh),
    ("", "Softplus"): _function(activations.softplus),
    ("", "Softsign"): _function(activations.softsign),
    ("", "Swish"): _function(activations.swish),
    ("", "Tan"): _function(activations.tan),
    ("", "ThresholdedRelu"): _function(activations.thresholded_relu),
    ("", "Cast"): _kept(activations.cast, recorded=replay.Recorded(draws=False, applies=replay.rounds)),
    ("", "CastLike"): _kept(activations.cast),
    ("", "Mod"): _kept(activations.modulo, data=(0, 1)),
    ("", "Pow"): OpSpec(data=(0, 1), lowering=products.power, axis=channel_axes.keeps),
    **{("", name): OpSpec(gradient=Gradient.ZERO, axis=channel_axes.keeps, recorded=_SIZES) for name in ("Ceil", "Floor", "Round")},
    ("", "Sign"): _ZERO,
    # normalizations
    ("", "BatchNormalization"): _image(norms.batch_normalization, channels=channels.batch_normalization),
    ("", "GroupNormalization"): _image(norms.group_normalization),
    ("", "InstanceNormalization"): _image(norms.instance_normalization),
    ("", "LayerNormalization"): _normalized(norms.layer_normalization),
    ("", "LpNormalization"): _kept(norms.lp_normalization),
    ("", "LRN"): _image(norms.local_response_normalization),
    ("", "MeanVarianceNormalization"): _kept(norms.mean_variance_normalization),
    ("", "RMSNormalization"): _normalized(norms.rms_normalization),
    ("", "SimplifiedLayerNormalization"): _features(
        norms.rms_normalization, axis=channel_axes.keeps, channels=channels.last_axis_normalization
    ),
    ("", "LogSoftmax"): OpSpec(axis=channel_axes.keeps),
    # sums, products and extremes
    ("", "CumSum"): _kept(reductions.cumulative_sum),
    ("", "Einsum"): _lowered(products.einsum, data=None),
    ("", "Max"): _kept(reductions.extreme_variadic, data=None),
    ("", "Mean"): _kept(reductions.mean_variadic, data=None),
    ("", "Min"): _kept(reductions.extreme_variadic, data=None),
    ("", "Sum"): _kept(reductions.sum_variadic, data=None, channels=channels.sums, mixes=True),
    ("", "ReduceL1"): _lowered(reductions.reduce_l1, axis=channel_axes.reduced),
    ("", "ReduceL2"): _lowered(reductions.reduce_l2, axis=channel_axes.reduced),
    ("", "ReduceLogSum"): _lowered(reductions.reduce_log_sum, axis=channel_axes.reduced),
    ("", "ReduceLogSumExp"): _lowered(reductions.reduce_log_sum_exp, axis=channel_axes.reduced),
    ("", "ReduceMax"): _lowered(reductions.reduce_extreme, axis=channel_axes.reduced),
    ("", "ReduceMean"): OpSpec(lowering=reductions.unless_nothing, axis=channel_axes.reduced),
    ("", "ReduceMin"): _lowered(reductions.reduce_extreme, axis=channel_axes.reduced),
    ("", "ReduceProd"): _lowered(reductions.reduce_prod, axis=channel_axes.reduced),
    ("", "ReduceSum"): OpSpec(lowering=reductions.unless_nothing, axis=channel_axes.reduced),
    ("", "ReduceSumSquare"): _lowered(reductions.reduce_sum_square, axis=channel_axes.reduced),
    # windows, places and sampling
    ("", "AffineGrid"): _lowered(sampling.affine_grid),
    ("", "Col2Im"): _lowered(pools.col2im),
    ("", "GlobalLpPool"): _image(reductions.global_pool),
    ("", "GlobalMaxPool"): _image(reductions.global_pool, channels=channels.pools),
    ("", "GridSample"): _image(sampling.grid_sample, data=(0, 1)),
    ("", "LpPool"): _image(pools.lp_pool),
    ("", "MaxUnpool"): _image(pools.max_unpool),
    ("", "OneHot"): _lowered(moves.one_hot, data=(2,)),
    ("", "RoiAlign"): _lowered(sampling.roi_align, data=(0, 1)),
    ("", "ScatterElements"): OpSpec(data=(0, 2), lowering=moves.scatter, axis=channel_axes.keeps),
    ("", "ScatterND"): OpSpec(data=(0, 2), lowering=moves.scatter, axis=channel_axes.keeps),
    # recurrent layers and losses
    **{("", name): _features(recurrent.recurrent, data=(0,)) for name in ("GRU", "LSTM", "RNN")},
    ("", "NegativeLogLikelihoodLoss"): _lowered(losses.negative_log_likelihood),
    ("", "SoftmaxCrossEntropyLoss"): _lowered(losses.softmax_cross_entropy),
    # onnxruntime's own
    (_MS, "Attention"): _features(attention.attention),
    (_MS, "BiasGelu"): _features(activations.gelu, data=(0, 1), axis=channel_axes.keeps),
    (_MS, "FastGelu"): _kept(activations.fast_gelu),
    (_MS, "FusedConv"): _image(fused.fused_conv),
    (_MS, "FusedGemm"): _features(fused.fused_gemm),
    (_MS, "FusedMatMul"): _features(fused.fused_matmul, data=(0, 1)),
    (_MS, "Gelu"): _function(activations.gelu),
    (_MS, "MultiHeadAttention"): _features(attention.multi_head_attention, data=(0, 1, 2)),
    (_MS, "QuickGelu"): _function(activations.swish),
    (_MS, "SkipLayerNormalization"): _features(norms.skip_layer_normalization, data=(0, 1)),
    (_MS, "SkipSimplifiedLayerNormalization"): _features(norms.skip_layer_normalization, data=(0, 1)),
    # quantizers of the training graph; gradients pass them straight through
    (LSQ_DOMAIN, "FakeQuant"): _FLOAT,
    ("", "QuantizeLinear"): _FLOAT,
    ("", "DequantizeLinear"): _FLOAT,
}
"""(domain, operator) to its row."""

UNKNOWN = OpSpec(gradient=Gradient.NONE)
"""The row of an operator that the table does not know."""

LOWERINGS = {key: row.lowering for key, row in TABLE.items() if row.lowering is not None}

QUANTIZERS: dict[tuple[str, str], Lowering] = {(LSQ_DOMAIN, "FakeQuant"): quantizers.fake_quant}
"""Quantizers without a kernel in every onnxruntime, as nodes that have one; the nodes' own gradients are lost."""


def spec_of(node: NodeProto) -> OpSpec:
    """The row of a node's operator."""
    return TABLE.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type), UNKNOWN)


_BRANCHES = replay.Recorded(False, inputs=(0,), applies=replay.decides)


def recorded(node: NodeProto) -> replay.Recorded | None:
    """What is recorded of a node's operator; of If, which has bodies and no row, its condition."""
    return _BRANCHES if node.op_type == "If" and not node.domain else spec_of(node).recorded


def executed(model: ModelProto, found: replay.Replay, read_as: Mapping[str, str] | None = None) -> ModelProto:
    """What samples run of a model: without settled Ifs, and with what was recorded as inputs.

    Parameters
    ----------
    model : ModelProto
    found : Replay
    read_as : mapping of str to str, optional
        What stands for a tensor of the recorded model in this one.
    """
    flat = flattened(model)
    result = found(flat, recorded, read_as)
    return result if result is flat else infer_shapes(result)


def is_known(node: NodeProto) -> bool:
    """True if the table has a row for the node's operator."""
    return ("" if node.domain == "ai.onnx" else node.domain, node.op_type) in TABLE


def is_elementwise(node: NodeProto) -> bool:
    """True if every output element depends on the input elements at its place only."""
    return spec_of(node).elementwise or node.op_type in ("Pow", "Mod")


def linear_form(node: NodeProto, view: GraphView) -> LinearForm | None:
    """A layer as a matrix product; None where it is none."""
    rule = spec_of(node).linear
    return rule(node, view) if rule is not None else None


def channels_of(view: GraphView, *, linear: bool = False) -> channels.Channels:
    """The channels of a graph that may be scaled; or, by the rules of linear operators alone, those that may be mixed."""
    axes = channel_axes_of(view)
    return channels.Channels(view, lambda node: spec.channels if (spec := spec_of(node)).mixes or not linear else None, axes)


def channel_axes_of(view: GraphView) -> dict[str, int]:
    """The channel axis of every computed tensor and input that has axes: the one place where it is decided."""

    def said_of(node: NodeProto) -> channel_axes.Said:
        spec = spec_of(node)
        # Which operand of a product of two computed matrices has channels nobody can tell.
        both = spec.weight is not None and spec.weight in (spec.data or ()) and not view.is_constant(node.input[spec.weight])
        reads = None if both else spec.output_axis
        data = [i for k, i in enumerate(node.input) if i and (spec.data is None or k in spec.data)]
        return channel_axes.Said(data, spec.output_axis, reads, spec.axis or (channel_axes.keeps if spec.elementwise else None))

    return channel_axes.channel_axes(view, said_of)


def output_channels(node: NodeProto, view: GraphView) -> int:
    """Number of output channels of a layer with a constant weight.

    Source: ONNX operators Conv (weight M x C/group x k), ConvTranspose (C x M/group x k), Gemm, MatMul.
    """
    spec = spec_of(node)
    shape = view.constant_shape(node.input[spec.weight or 0])
    return int(shape[spec.weight_axis(node)]) * (int_attribute(node, "group", 1) if spec.grouped_axis else 1)


def without_gradient(view: GraphView) -> frozenset[str]:
    """Names of the nodes that gradients cannot pass."""
    return frozenset(n.name for n in view.nodes if spec_of(n).gradient in (Gradient.NONE, Gradient.ZERO) or n.doc_string == STOP)


def pointwise(view: GraphView, tensor: str, fits: Callable[[tuple[int, ...]], bool]) -> tuple[list[NodeProto], str]:
    """What computes a function of each element of a tensor alone.

    Parameters
    ----------
    view : GraphView
    tensor : str
    fits : callable
        Of the shape of a constant: True if it may take part.

    Returns
    -------
    list of NodeProto
        In order.
    str
        The one tensor through which ``tensor`` acts. Where there are several it is ``tensor`` itself, without nodes.
    """
    inside, nodes = {tensor}, list[NodeProto]()
    for node in view.nodes:
        reads = [i for i in node.input if i]
        constants_fit = all(fits(view.constant_shape(i)) for i in reads if view.is_constant(i))
        known = all(i in inside or view.is_constant(i) for i in reads)
        if known and constants_fit and inside.intersection(reads) and spec_of(node).elementwise:
            inside.add(node.output[0])
            nodes.append(node)
    exits = [t for t in inside if t in view.outputs or any(n.output[0] not in inside for n in view.consumers[t])]
    return (nodes, exits[0]) if len(exits) == 1 else ([], tensor)


def output_parts(view: GraphView) -> list[str]:
    """The float tensors that the outputs are put together from.

    An output is looked into through operators that only rearrange its elements (a detector that joins boxes and scores
    has a part of each kind, and each has a spread of its own), and through operators that no gradient passes.
    """
    blocked = without_gradient(view)
    parts: dict[str, None] = {}
    queue, seen = list(view.outputs), set[str]()
    while queue:
        name = queue.pop(0)
        node = view.producer.get(name)
        if name in seen or node is None:
            continue
        seen.add(name)
        row = spec_of(node)
        if view.is_float(name) and row.rearranges:
            queue.extend(row.data_inputs(node))
        elif view.is_float(name) and node.name not in blocked:
            parts[name] = None
        else:
            queue.extend(i for i in node.input if i and not view.is_constant(i))
    return list(parts)
