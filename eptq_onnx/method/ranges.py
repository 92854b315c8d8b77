"""Choose weight ranges (HMSE, paper section 3.3) that leave room for the integer bias."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import ModelProto

from eptq_onnx.config import Config, WeightRange
from eptq_onnx.graph.view import Constants, GraphView
from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.blocks import block_grid
from eptq_onnx.numerics.formats import PerBlock
from eptq_onnx.numerics.spec import QuantSpec
from eptq_onnx.numerics.types import Array
from eptq_onnx.ops import output_channels
from eptq_onnx.records import Calibration, Plan, Rounding, Scores


def weight_ranges(
    model: ModelProto,
    plan: Plan,
    calibration: Calibration,
    scores: Scores | None,
    config: Config,
    searched: Collection[str] | None = None,
) -> Rounding:
    """Choose weight scales and zero points, and round to nearest.

    Parameters
    ----------
    model : ModelProto
        The normalized float model.
    plan : Plan
    calibration : Calibration
        Its activation scales are factors of the bias scale.
    scores : Scores or None
        Hessian scores; the ranges of weights without a score minimize the plain MSE.
    config : Config
    searched : collection of str, optional
        Weights whose ranges are searched; the others, which a later step ranges anew, get their extremes. By
        default all.

    Returns
    -------
    Rounding
        Nearest rounding with the chosen ranges, the starting point of the optimization.
    """
    view = GraphView(model)
    grids, integers = {}, {}
    smallest = _smallest_scales(view, plan, calibration)
    for name, spec in plan.weight_specs.items():
        weight: Array = np.asarray(view.constant(name), np.float32)
        importance = scores.weights.get(name) if scores else None
        method = config.weight_range_method if searched is None or name in searched else WeightRange.MINMAX
        weighed = importance if method is WeightRange.HMSE else None
        if isinstance(spec.granularity, PerBlock):
            # Layers with blocks have no integer bias.
            grids[name] = block_grid(weight, spec, weighed, search=method is not WeightRange.MINMAX)
            integers[name] = grids[name].in_container(weight)
            continue
        scale = np.maximum(
            _scales(weight, spec, weighed, method, config.damping), smallest.get(name, np.float32(0))
        )
        scale = spec.scales.above(scale)
        grids[name] = spec.grid(scale, quant_math.zero_points(weight, scale, spec, weighed, config.damping))
        integers[name] = grids[name].in_container(weight)
    return Rounding(integers, grids, dict(calibration.grids), biases(view, plan), Constants(view, integers))


def biases(view: GraphView, plan: Plan) -> dict[str, Array]:
    """Return the bias of every layer that can have one; zeros where the float model has none."""
    result: dict[str, Array] = {}
    nodes = {n.name: n for n in view.nodes}
    for layer in plan.layers:
        if layer.bias is not None and layer.has_bias:
            result[layer.bias] = np.asarray(view.constant(layer.bias), np.float32)
        elif layer.bias is not None:
            result[layer.bias] = np.zeros(output_channels(nodes[layer.node], view), np.float32)
    return result


def _scales(
    weight: Array, spec: QuantSpec, importance: Array | None, method: WeightRange, damping: float
) -> Array:
    if method is WeightRange.MINMAX:
        rows = spec.granularity.rows(weight)
        scales = np.where(rows.any(axis=1), quant_math.max_scales(rows, spec), np.float32(1)).astype(
            np.float32
        )
        return spec.granularity.scales_of(scales, weight.shape)
    return quant_math.weight_scales(weight, spec, importance, damping)


def _smallest_scales(view: GraphView, plan: Plan, calibration: Calibration) -> dict[str, Array]:
    """Return per weight the scales below which the integer bias would overflow."""
    inputs = plan.input_scales({name: grid.scale for name, grid in calibration.grids.items()})
    result: dict[str, Array] = {}
    for layer in plan.static_layers:
        if layer.bias is None or not layer.has_bias or plan.bias is None:
            continue
        bias, axis = np.asarray(view.constant(layer.bias), np.float32), layer.weight_spec.axis
        if axis is not None and bias.size != view.constant_shape(layer.weight)[axis]:
            continue
        limit = plan.bias.least_weight_scale(bias, inputs[layer.node])
        limit = limit if axis is not None else limit.max(initial=0)
        result[layer.weight] = np.maximum(result.get(layer.weight, np.float32(0)), limit)
    return result
