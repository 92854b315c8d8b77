"""Rules about numbers: types, zero points, scales, axes and ranges."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from eptq_onnx.graph.view import int_attribute, opset_of
from eptq_onnx.numerics.biases import bias_scale
from eptq_onnx.numerics.quant_math import prescribed_grid
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.rules.roles import activation_of, bias_of, biases_of, rows_of, weights_of
from eptq_onnx.rules.rule import Rule, Severity, rule
from eptq_onnx.rules.view import QdqView, Quantized
from eptq_onnx.targets import ONNXRUNTIME, OPSETS, Target

_PER_AXIS, _BLOCKED = 13, 21
"""First opsets with per-axis scales and with blocked scales."""
TYPE_BITS = {"uint16": 16, "int16": 16, "uint4": 4, "int4": 4, "uint2": 2, "int2": 2}
"""Widths of the integer types that do not have 8 bits."""
_PRECISION = 1e-3
"""Relative tolerance between a bias scale and the product of the input and weight scales."""


def _activations(view: QdqView) -> list[Quantized]:
    return [*view.quantizers, *(q for q in view.dequantizers if not q.constant)]


@rule(
    "scale",
    Severity.ERROR,
    "Scales are positive, finite constants.",
    "Calibrate again with samples that reach this tensor, or leave it float.",
)
def scale(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: onnx-tensorrt importers; ONNX QuantizeLinear."""
    for q in (*view.quantizers, *view.dequantizers):
        if q.scale is None:
            yield q.node.name, "its scale is computed at run time"
        elif not (np.isfinite(q.scale.astype(np.float64)) & (q.scale.astype(np.float64) > 0)).all():
            yield q.node.name, f"a scale is {np.min(q.scale):g}"


@rule(
    "opset",
    Severity.ERROR,
    "Types and granularities exist in the opset that the model imports.",
    "Convert the model to that opset.",
)
def opset(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: ONNX operator changelog, QuantizeLinear."""
    own = opset_of(view.graph.model)
    for q in (*view.quantizers, *view.dequantizers):
        if q.node.domain not in ("", "ai.onnx"):
            continue
        needed = OPSETS.get(q.type_name, 1)
        needed = max(needed, _PER_AXIS if q.axis is not None else 1)
        needed = max(needed, _BLOCKED if q.block else 1)
        if own < needed:
            yield q.node.name, f"this use of {q.type_name} needs opset {needed}, but the model imports {own}"


@rule(
    "type",
    Severity.ERROR,
    "Activations, weights and biases have types that the target supports.",
    "Quantize to the types of the target, or leave the tensor float.",
)
def types(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: onnx-tensorrt importers (int8 only, no int32); OpenVINO low-precision transformations."""
    if target.verifier != ONNXRUNTIME:
        yield from _foreign_types(view, target)


@rule(
    "kernel-type",
    Severity.WARNING,
    "Activations, weights and biases have the types of the target's fastest integer kernels.",
    "Quantize to the types of the target, or leave the tensor float.",
)
def kernel_types(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: onnxruntime, which runs quantizers of every type, some of them without an integer kernel."""
    if target.verifier == ONNXRUNTIME:
        yield from _foreign_types(view, target)


def _foreign_types(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Yield the tensors whose integers are not of the target's types."""
    own, wide = (target.activation.type_name(bits) for bits in (8, 16))
    for q in _activations(view):
        if q.type_name not in (own, wide):
            yield q.node.name, f"an activation is {q.type_name}, and {target.name} takes {own}"
    biases, weight, bias = biases_of(view), target.weight, target.bias
    narrow = {f"{sign}int{width}" for width in weight.storage for sign in ("", "u")}
    layers = {w.node.name for _, w, _ in weights_of(view, target)}
    for q in view.dequantizers:
        if not q.constant or (q.block and target.blocks.sizes):
            continue
        if q.node.name in biases:
            taken = f"{bias.container} biases" if bias.integer else "float biases"
            if not bias.integer or q.type_name != bias.container:
                yield q.node.name, f"a bias is {q.type_name}, and {target.name} takes {taken}"
        elif q.type_name == "int32":
            yield q.node.name, "an int32 constant is not the bias of a layer"
        elif q.type_name == wide and q.node.name not in layers:
            continue  # a constant that is read like an activation
        elif q.type_name not in (own, weight.container, *narrow):
            yield q.node.name, f"a constant is {q.type_name}, and {target.name} takes {weight.container}"


@rule(
    "clipped-floats",
    Severity.ERROR,
    "No Relu or Clip comes before a quantizer to 8-bit floats in a file for onnxruntime.",
    "Quantize to integers, or disable onnxruntime's optimizers ReluQuantRewrite and ClipQuantRewrite.",
)
def clipped_floats(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: measured; onnxruntime 1.18 to 1.32 drops the Relu, and negative values get through."""
    for q in view.quantizers if target.verifier == ONNXRUNTIME else ():
        maker = view.graph.producer.get(q.node.input[0])
        if maker is not None and maker.op_type in ("Relu", "Clip") and q.type_name.startswith("float8"):
            yield q.node.name, f"onnxruntime drops the {maker.op_type} before this quantizer to {q.type_name}"


@rule(
    "zero-point",
    Severity.ERROR,
    "Zero points are 0 where the target has only symmetric kernels.",
    "Quantize symmetrically.",
)
def zero_point(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: onnx-tensorrt importers; onnxruntime qdq_selectors.cc (weights and biases)."""
    shifting = target.blocks.zero_points
    weights = {w.node.name for _, w, _ in weights_of(view, target) if not (w.block and shifting)}
    biases = biases_of(view)
    for q in (*view.quantizers, *view.dequantizers):
        fixed = q.node.name in weights or q.node.name in biases
        if q.is_shifted and (fixed or (target.activation.symmetric and not (q.block and shifting))):
            what = "a weight" if q.node.name in weights else "a bias" if fixed else "an activation"
            yield q.node.name, f"the zero point of {what} is not 0"


@rule(
    "bias-zero-point",
    Severity.ERROR,
    "DequantizeLinear of int32 has no zero point if the target rejects one.",
    "Omit the third input of DequantizeLinear.",
)
def bias_zero_point(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: onnxruntime-web, WebGPU provider."""
    for q in view.dequantizers:
        if not target.bias.zero_point and q.elem_type == TensorProto.INT32 and len(q.node.input) > 2:
            yield q.node.name, f"a bias has a zero point, and {target.name} takes none"


@rule(
    "bias-scale",
    Severity.ERROR,
    "The scale of an integer bias is the product of the input scale and the weight scale.",
    "Quantize the bias with that product.",
)
def bias_scales(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: ONNX QLinearConv."""
    for node, weight, _ in weights_of(view, target):
        bias, x = bias_of(node, view), activation_of(node.input[0], view, target)
        if bias is None or x is None or bias.elem_type != TensorProto.INT32:
            continue
        if bias.scale is None or weight.scale is None or x.scale is None or x.scale.size != 1:
            continue
        product = bias_scale(x.scale.reshape(()), weight.scale)
        if not np.allclose(bias.scale.reshape(-1), product.reshape(-1), rtol=_PRECISION, atol=0):
            yield node.name, "the scale of its bias is not its input scale times its weight scale"


@rule(
    "activation-scale",
    Severity.ERROR,
    "Activations have one scale per tensor.",
    "Quantize activations per tensor.",
)
def activation_scale(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: onnx-tensorrt importers; onnxruntime qdq_selectors.cc."""
    for q in _activations(view):
        if q.scale is not None and q.scale.size > 1:
            yield q.node.name, f"an activation has {q.scale.size} scales"


@rule(
    "range",
    Severity.ERROR,
    "Activations cover at least the smallest real range that the target takes.",
    "Raise the scale of this activation.",
)
def least_range(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: onnxruntime, quantization for the QNN execution provider."""
    least = target.activation.least_range
    for q in _activations(view):
        steps = 2 ** _bits_of(q) - 1
        if q.scale is not None and float(q.scale.max(initial=0)) * steps < least * (1 - _PRECISION):
            reach = float(q.scale.max(initial=0)) * steps
            yield q.node.name, f"its range is {reach:.2g}, but {target.name} takes at least {least:g}"


@rule(
    "output-range",
    Severity.WARNING,
    "Outputs whose range the target prescribes have exactly that range.",
    "Quantize this output with the scale and zero point that divide the prescribed range evenly.",
)
def output_range(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: onnxruntime, quantization for the QNN execution provider; the TFLite int8 specification."""
    for node, row in rows_of(view, target):
        if row.output_range is None:
            continue
        for q in view.written(node.output[0]):
            if q.scale is None or q.scale.size != 1:
                continue
            wanted = prescribed_grid(row.output_range, target.activation_spec(_bits_of(q)))
            scale, zero = float(q.scale.reshape(())), int(q.zeros.reshape(()))
            if (scale, zero) != (float(wanted.scale), wanted.zero_point):
                yield (
                    node.name,
                    f"its output has the scale {scale:.4g} and the zero point {zero}, not "
                    f"{float(wanted.scale):.4g} and {wanted.zero_point}",
                )


def _bits_of(q: Quantized) -> int:
    """Return the width of a quantizer's type."""
    return TYPE_BITS.get(q.type_name, 8)


@rule(
    "weight-axis",
    Severity.ERROR,
    "A weight has one scale per output channel, or one for the whole tensor.",
    "Quantize weights along their output-channel axis, or per tensor where the target requires it.",
)
def weight_axis(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: TensorRT, working with quantized types; ONNX QLinearConv."""
    for node, weight, axis in weights_of(view, target):
        if weight.axis is None or weight.block:
            continue
        if not target.of(node.op_type).weight.per_channel:
            yield node.name, f"its weight has several scales, but {target.name} takes one for {node.op_type}"
        elif weight.axis != axis:
            yield (
                node.name,
                f"its weight scales lie along axis {weight.axis}, but its output channels along axis {axis}",
            )


@rule(
    "block-size",
    Severity.ERROR,
    "Blocks of weights have a size that the target reads.",
    "Quantize in blocks of such a size, or with one scale per output channel.",
)
def block_size(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: TensorRT, working with quantized types (blocks of 64 and 128); onnxruntime."""
    sizes = target.blocks.sizes
    for q in view.dequantizers:
        if q.constant and q.block and q.block not in sizes:
            taken = f"blocks of {', '.join(map(str, sizes))} terms" if sizes else "no blocks"
            yield q.node.name, f"its blocks have {q.block} terms, and {target.name} reads {taken}"


@rule(
    "power-of-two",
    Severity.ERROR,
    "Scales are powers of two where the target shifts instead of multiplying.",
    "Choose the smallest power of two that clips nothing, or the one with the least error.",
)
def power_of_two(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: AMD Quark, XINT8."""
    rules = {True: target.weight.scale, False: target.activation.scale}
    for q in (*view.quantizers, *view.dequantizers):
        if q.scale is None or q.elem_type == TensorProto.INT32:
            continue
        scales = np.abs(q.scale.astype(np.float64))
        if not np.isfinite(scales).all() or not scales.all():
            continue  # the rule about scales tells
        if rules[q.constant] is ScaleRule.POWER_OF_TWO and not (np.frexp(scales)[0] == 0.5).all():
            yield q.node.name, "a scale is not a power of two"


@rule(
    "weight-range",
    Severity.WARNING,
    "Weights stay in the range in which the target's kernels cannot saturate.",
    "Quantize weights to that range, or choose a target whose kernels take the full range.",
)
def weight_range(view: QdqView, target: Target) -> Iterator[tuple[str, str]]:
    """Source: vpmaddubsw adds two products of uint8 and int8 in 16 bits; TensorRT uses −127 to 127."""
    for node, weight, _ in weights_of(view, target):
        values = view.value(weight.integers)
        if values is None or weight.type_name != "int8" or not values.size or weight.block:
            continue
        shape = view.graph.static_shape(node.input[1])
        single = (int_attribute(node, "group", 1), 1)
        depthwise = node.op_type == "Conv" and shape is not None and shape[:2] == single
        rules = target.of(node.op_type).weight
        low, high = (rules.depthwise_range_8_bits if depthwise else None) or rules.range_8_bits
        # Products of 64 fit where those of 63 do: 2 · 255 · 64 is below 2**15.
        high = max(high, -low)
        least, most = int(values.min()), int(values.max())
        if least < low or most > high:
            taken = f"{target.name} takes {low} to {high}"
            yield node.name, f"its weights go from {least} to {most}, but {taken}"


NUMBERS: tuple[Rule, ...] = (
    scale, opset, types, kernel_types, clipped_floats, zero_point, bias_zero_point, bias_scales,
    activation_scale, least_range, output_range, weight_axis, block_size, power_of_two, weight_range,
)  # fmt: skip
