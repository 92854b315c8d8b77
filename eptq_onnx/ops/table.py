"""The operator table: for each operator, how it is quantized and where its gradient comes from.

To add an operator, add a row here and samples in ``tests/op_samples.py``. An operator without a row is not an
error: it stays float, and the report says so.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from eptq_onnx.graph import channel_axes, channels, replay
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
from eptq_onnx.graph.lower.formula import formula
from eptq_onnx.graph.view import GraphView, int_attribute
from eptq_onnx.numerics.linear import LinearForm
from eptq_onnx.ops import details
from eptq_onnx.ops.spec import Gradient, OpSpec, Role

LSQ_DOMAIN = "com.microsoft"
"""Domain of `FakeQuant` (x, scale, zero_point → y, mask), the quantizer that engines differentiate: with the
straight-through estimator for x inside the range, and the LSQ rule (Esser et al. 2020) for the scale."""


def _layer_channels(node: NodeProto, slots: channels.Channels) -> bool:
    """Apply `eptq_onnx.graph.channels.layer` to a layer with a constant weight."""
    spec = spec_of(node)
    form = linear_form(node, slots.view) if slots.view.is_constant(node.input[spec.weight or 0]) else None
    axis = 0 if spec.output_axis is None else spec.output_axis
    return form is not None and channels.layer(node, slots, form, spec.weight or 0, spec.bias, axis)


def _clip_channels(node: NodeProto, slots: channels.Channels) -> bool:
    """Let factors pass through a Clip whose limits are 0 or infinite; scaling does not change these."""
    return (
        details.clip_objection(node, slots.view) is None
        and set(details.clip_bounds(node, slots.view)) <= {0.0, -np.inf, np.inf}
        and channels.passes(node, slots)
    )


def _lowered(rule: Lowering, role: Role = Role.FLOAT, **options: object) -> OpSpec:
    return OpSpec(role, lowering=rule, gradient=Gradient.LOWERED, **options)  # type: ignore[arg-type]


def _function(rule: Lowering, role: Role = Role.FLOAT, **options: object) -> OpSpec:
    """Return the row of an elementwise function that is lowered to other operators."""
    return _lowered(rule, role, elementwise=True, **options)


def _kept(rule: Lowering, role: Role = Role.FLOAT, **options: object) -> OpSpec:
    """Return the row of a lowered operator that keeps the channel axis."""
    return _lowered(rule, role, axis=channel_axes.keeps, **options)


def _image(rule: Lowering, role: Role = Role.FLOAT, **options: object) -> OpSpec:
    """Return the row of a lowered operator on images or volumes, with channels along axis 1."""
    return _lowered(rule, role, output_axis=1, **options)


def _features(rule: Lowering, **options: object) -> OpSpec:
    """Return the row of a lowered operator with features along the last axis."""
    return _lowered(rule, Role.FLOAT, output_axis=-1, **options)


def _normalized(rule: Lowering) -> OpSpec:
    """Return the row of a normalization over the last axis."""
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
        linear=details.conv_form,
        objection=details.conv_objection,
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
        linear=details.conv_transpose_form,
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
        linear=details.gemm_form,
        channels=_layer_channels,
        mixes=True,
        objection=details.gemm_objection,
    ),
    ("", "MatMul"): OpSpec(
        Role.LAYER,
        data=(0, 1),
        weight=1,
        weight_axis=lambda node: -1,
        output_axis=-1,
        axis=channel_axes.stacked,
        linear=details.matmul_form,
        channels=_layer_channels,
        mixes=True,
        objection=details.matmul_objection,
        lowering=products.matmul,
    ),
    # arithmetic that some runtimes compute on integers
    **{
        ("", name): OpSpec(Role.ARITHMETIC, data=None, elementwise=True, channels=channels.sums, mixes=True)
        for name in ("Add", "Sub")
    },
    ("", "Mul"): OpSpec(Role.ARITHMETIC, data=None, elementwise=True, channels=channels.multiplied),
    ("", "Div"): OpSpec(Role.ARITHMETIC, data=None, elementwise=True, channels=channels.divided),
    ("", "Concat"): OpSpec(
        Role.ARITHMETIC,
        data=None,
        rearranges=True,
        channels=channels.concatenation,
        mixes=True,
        axis=channel_axes.keeps,
    ),
    ("", "Where"): OpSpec(Role.ARITHMETIC, data=(1, 2), axis=channel_axes.keeps),
    ("", "AveragePool"): OpSpec(
        Role.ARITHMETIC,
        lowering=pools.average_pool,
        objection=details.averagepool_objection,
        channels=channels.pools,
        mixes=True,
        output_axis=1,
    ),
    ("", "GlobalAveragePool"): OpSpec(Role.ARITHMETIC, channels=channels.pools, mixes=True, output_axis=1),
    ("", "LeakyRelu"): OpSpec(Role.ARITHMETIC, elementwise=True, channels=channels.passes),
    ("", "Sigmoid"): OpSpec(Role.ARITHMETIC, elementwise=True, bounds=details.unit),
    ("", "Softmax"): OpSpec(Role.ARITHMETIC, bounds=details.unit, axis=channel_axes.keeps),
    ("", "Tanh"): OpSpec(Role.ARITHMETIC, elementwise=True),
    ("", "HardSigmoid"): _function(activations.hard_sigmoid, Role.ARITHMETIC, bounds=details.unit),
    ("", "HardSwish"): _function(activations.hard_swish, Role.ARITHMETIC),
    ("", "PRelu"): _function(activations.prelu, Role.ARITHMETIC, data=(0, 1), channels=channels.passes),
    # moves of values, with one scale for input and output
    ("", "MaxPool"): OpSpec(
        Role.EQUAL_SCALE,
        lowering=pools.max_pool,
        objection=details.maxpool_objection,
        channels=channels.pools,
        output_axis=1,
    ),
    **{("", name): _reshapes(channel_axes.reshaped) for name in ("Reshape", "Flatten")},
    **{("", name): _reshapes(channel_axes.squeezed) for name in ("Squeeze", "Unsqueeze")},
    ("", "Transpose"): OpSpec(
        Role.EQUAL_SCALE,
        rearranges=True,
        channels=channels.transpose,
        mixes=True,
        axis=channel_axes.transposed,
    ),
    ("", "Identity"): OpSpec(
        Role.EQUAL_SCALE, rearranges=True, channels=channels.passes, mixes=True, axis=channel_axes.keeps
    ),
    ("", "Gather"): OpSpec(Role.EQUAL_SCALE, table=details.rows_looked_up, axis=channel_axes.gathered),
    **{("", name): _MOVES for name in ("GatherElements", "GatherND", "Expand", "Tile")},
    ("", "Slice"): OpSpec(Role.EQUAL_SCALE, lowering=moves.slices, axis=channel_axes.keeps),
    ("", "Split"): _kept(moves.split, Role.EQUAL_SCALE, channels=channels.split, mixes=True),
    ("", "Pad"): OpSpec(
        Role.EQUAL_SCALE,
        objection=details.pad_objection,
        lowering=moves.pad,
        channels=channels.pads,
        mixes=True,
        axis=channel_axes.keeps,
    ),
    **{
        ("", name): _kept(
            sampling.resize,
            Role.EQUAL_SCALE,
            objection=details.resize_objection,
            channels=channels.keeps_channels,
            mixes=True,
        )
        for name in ("Resize", "Upsample")
    },
    ("", "DepthToSpace"): _image(moves.depth_to_space, Role.EQUAL_SCALE, rearranges=True),
    ("", "SpaceToDepth"): _image(moves.space_to_depth, Role.EQUAL_SCALE, rearranges=True),
    ("", "CenterCropPad"): _kept(moves.centre_crop_pad, Role.EQUAL_SCALE),
    ("", "Compress"): _kept(
        moves.compress,
        Role.EQUAL_SCALE,
        recorded=replay.Recorded(False, inputs=(1,), orders=True, applies=replay.decides),
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
    ("", "TopK"): _kept(
        reductions.top_k,
        recorded=replay.Recorded(draws=False, outputs=(1,), rest=replay.top_k_values, orders=True),
    ),
    ("", "Unique"): _lowered(
        moves.unique,
        recorded=replay.Recorded(draws=False, outputs=(1, 2, 3), rest=replay.unique_values, orders=True),
    ),
    **{("", name): _CHOICE for name in ("ArgMax", "ArgMin")},
    **{("", name): _ROWS for name in ("NonMaxSuppression", "NonZero")},
    ("", "Hardmax"): OpSpec(
        gradient=Gradient.ZERO, axis=channel_axes.keeps, recorded=replay.Recorded(draws=False)
    ),
    **{("", name): _DRAW for name in replay.RANDOM},
    # clipping
    ("", "Relu"): OpSpec(Role.CLIPPING, elementwise=True, bounds=details.positive, channels=channels.passes),
    ("", "Clip"): OpSpec(
        Role.CLIPPING,
        elementwise=True,
        bounds=details.clip_bounds,
        objection=details.clip_objection,
        channels=_clip_channels,
    ),
    # elementwise float functions
    **{
        ("", name): OpSpec(elementwise=True)
        for name in ("Abs", "Cos", "Erf", "Exp", "Log", "Neg", "Reciprocal", "Sin", "Sqrt")
    },
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
    ("", "Mish"): _function(formula("Mish (x) => (y) { p = Softplus (x)  t = Tanh (p)  y = Mul (x, t) }")),
    ("", "Selu"): _function(activations.selu),
    ("", "Shrink"): _function(activations.shrink),
    ("", "Sinh"): _function(activations.sinh),
    ("", "Softplus"): _function(activations.softplus),
    ("", "Softsign"): _function(
        formula(
            "Softsign (x) => (y) "
            "{ one = Constant <value_float = 1.0> ()  a = Abs (x)  b = Add (a, one)  y = Div (x, b) }"
        )
    ),
    ("", "Swish"): _function(activations.swish),
    ("", "Tan"): _function(activations.tan),
    ("", "ThresholdedRelu"): _function(activations.thresholded_relu),
    ("", "Cast"): _kept(activations.cast, recorded=replay.Recorded(draws=False, applies=replay.rounds)),
    ("", "CastLike"): _kept(activations.cast),
    ("", "Mod"): _kept(activations.modulo, data=(0, 1)),
    ("", "Pow"): OpSpec(data=(0, 1), lowering=products.power, axis=channel_axes.keeps),
    **{
        ("", name): OpSpec(gradient=Gradient.ZERO, axis=channel_axes.keeps, recorded=_SIZES)
        for name in ("Ceil", "Floor", "Round")
    },
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
    # sums, products, minima and maxima
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
    # windows, indices and sampling
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
    **{
        ("", name): _features(recurrent.recurrent, data=(0,), held={1: 1, 2: 1})
        for name in ("GRU", "LSTM", "RNN")
    },
    ("", "NegativeLogLikelihoodLoss"): _lowered(losses.negative_log_likelihood),
    ("", "SoftmaxCrossEntropyLoss"): _lowered(losses.softmax_cross_entropy),
    # onnxruntime's own
    (_MS, "Attention"): _features(attention.attention, held={1: 1}),
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
    ("", "DynamicQuantizeLinear"): _FLOAT,
}
"""(domain, operator) to row."""

UNKNOWN = OpSpec(gradient=Gradient.NONE)
"""The row of every operator that is not in the table."""

LOWERINGS = {key: row.lowering for key, row in TABLE.items() if row.lowering is not None}

QUANTIZERS: dict[tuple[str, str], Lowering] = {(LSQ_DOMAIN, "FakeQuant"): quantizers.fake_quant}
"""Lowerings of quantizers that not every onnxruntime has a kernel for; the quantizers' gradients are lost."""


def spec_of(node: NodeProto) -> OpSpec:
    """Return the row of a node's operator."""
    return TABLE.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type), UNKNOWN)


def is_known(node: NodeProto) -> bool:
    """Return True if the table has a row for the node's operator."""
    return ("" if node.domain == "ai.onnx" else node.domain, node.op_type) in TABLE


def linear_form(node: NodeProto, view: GraphView) -> LinearForm | None:
    """Return a layer as a matrix product, or None if it is not one."""
    rule = spec_of(node).linear
    return rule(node, view) if rule is not None else None
