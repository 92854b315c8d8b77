"""Step 5b: the closed-form start, layer by layer.

In topological order, each weight is first bent to make up for the errors upstream, then rounded with error
compensation, and the bias takes up the mean of what is left; see `eptq_onnx.compensation`. Float and quantized network
are walked once, side by side: the inputs of a layer follow from those of the layers before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from eptq_onnx import compensation, quant_math
from eptq_onnx.config import Config
from eptq_onnx.data import Samples
from eptq_onnx.graph import edit
from eptq_onnx.graph.view import GraphView
from eptq_onnx.graph.walk import Walk
from eptq_onnx.linear import LinearForm
from eptq_onnx.ops import spec_of
from eptq_onnx.types import Array, Feeds, Layer, Plan, QuantParams, QuantSpec, Rounding, Scores

_ROWS_PER_TERM, _LEAST_ROWS, _MOST_ROWS = 16, 4096, 20_000
_RATIOS = (1.0, 0.85, 0.7, 0.55)
"""Scales that are tried, in units of the one that MSE chooses for the corrected weight."""


def closed_form(
    model: ModelProto,
    quantized: ModelProto,
    plan: Plan,
    start: Rounding,
    samples: Samples,
    indices: NDArray[np.int64],
    scores: Scores | None,
    config: Config,
    progress: Callable[[int, int], None],
) -> tuple[Rounding, dict[str, str]]:
    """Correct and round every layer on the inputs that it gets in the quantized network.

    Parameters
    ----------
    model : ModelProto
        The normalized float model.
    quantized : ModelProto
        The QDQ model of ``start``; it gives the quantizers of the activations.
    plan : Plan
    start : Rounding
        What is not rounded here keeps its values.
    samples : Samples
    indices : ndarray of shape (n_samples,)
        The samples to look at.
    scores : Scores or None
    config : Config
    progress : callable
        Called with layers done and layers in all.

    Returns
    -------
    Rounding
    dict of str to str
        Layers that keep their rounding, and why.
    """
    chosen = indices[: _affordable(model, plan, samples, len(indices), config)]
    parts = list(samples.batches(chosen, samples.micro_batch(8)))
    feeds = [samples.take(part) for part in parts]
    student, names = _with_open_layers(quantized, plan)
    walks = Walk(model, feeds), Walk(student, feeds)
    view = GraphView(model)
    nodes = {n.name: n for n in view.nodes}
    inputs = {n.name: n.input[0] for n in student.graph.node}
    shared = Counter(layer.weight for layer in plan.layers)
    integers, weights, biases, targets = (dict(d) for d in (start.integers, start.weights, start.biases, start.targets))
    skipped: dict[str, str] = {}
    for k, layer in enumerate(plan.layers):
        node, spec = nodes[layer.node], layer.weight_spec
        form = _form(node, view)
        weight: Array = np.asarray(view.constant(layer.weight), np.float32)
        exact = walks[0].reach(layer.input)
        rough = walks[1].reach(inputs[layer.node])
        if form is None:
            skipped[layer.node] = "its weight has no closed form"
        elif shared[layer.weight] > 1:
            skipped[layer.node] = f"its weight {layer.weight} is shared by several layers"
        moments = _moments(form, weight, exact, rough, config.seed + k) if form is not None else None
        s_x = start.activations[plan.quantizer_of[layer.input].name].scale
        if form is not None and moments is not None:
            rounded = np.asarray(form.weight_rows(quant_math.dequantize(integers[layer.weight], weights[layer.weight], spec)))
            if layer.node not in skipped:
                least = quant_math.smallest_weight_scale(biases[layer.bias], s_x) if layer.bias and plan.integer_bias else None
                problem = _Problem(form, weight, spec, moments, config)
                result = problem.solve(weights[layer.weight], least)
                integers[layer.weight], weights[layer.weight], targets[layer.weight] = result
                rounded = np.asarray(form.weight_rows(quant_math.dequantize(result[0], result[1], spec)))
            if layer.bias is not None:
                biases[layer.bias] = biases[layer.bias] + _mean_error(np.asarray(form.weight_rows(weight)), rounded, moments)
        walks[1].set_constant(names[layer.node][0], quant_math.dequantize(integers[layer.weight], weights[layer.weight], spec))
        if layer.bias is not None:
            bias = biases[layer.bias]
            if plan.integer_bias:
                bias = quant_math.round_bias(bias, s_x, weights[layer.weight].scale)
            walks[1].set_constant(names[layer.node][1], bias)
        progress(k + 1, len(plan.layers))
    return replace(start, integers=integers, weights=weights, biases=biases, targets=targets), skipped


def _form(node: NodeProto, view: GraphView) -> LinearForm | None:
    row = spec_of(node)
    return row.linear(node, view) if row.linear is not None else None


def _affordable(model: ModelProto, plan: Plan, samples: Samples, count: int, config: Config) -> int:
    """How many samples the walk can hold in memory."""
    return min(count, config.start_samples)


def _with_open_layers(quantized: ModelProto, plan: Plan) -> tuple[ModelProto, dict[str, tuple[str, str]]]:
    """The QDQ model with weights and biases to be set during the walk, and their names by layer node."""
    builder = edit.Builder(quantized, "closed_form/")
    layers = {layer.node: layer for layer in plan.layers}
    names: dict[str, tuple[str, str]] = {}
    for node in quantized.graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        layer = layers.get(node.name)
        if layer is not None:
            names[node.name] = builder.unique(f"{node.name}/weight"), builder.unique(f"{node.name}/bias")
            position = list(spec_of(node).data or ()), spec_of(node).weight or 0
            copy.input[position[1]] = names[node.name][0]
            if layer.bias is not None:
                del copy.input[2:]
                copy.input.append(names[node.name][1])
        builder.nodes.append(copy)
    return onnx.shape_inference.infer_shapes(edit.with_nodes(quantized, builder.nodes)), names


def _moments(
    form: LinearForm, weight: Array, exact: Sequence[NDArray[np.generic]], rough: Sequence[NDArray[np.generic]], seed: int
) -> compensation.Moments:
    terms = form.weight_rows(weight).shape[2]
    wanted = int(np.clip(_ROWS_PER_TERM * terms, _LEAST_ROWS, _MOST_ROWS))
    total = sum(form.positions(x.shape) for x in exact)
    rng = np.random.default_rng(seed)
    moments = compensation.Moments()
    for x_f, x_q in zip(exact, rough, strict=True):
        available = form.positions(x_f.shape)
        share = min(available, max(1, round(wanted * available / total)))
        chosen = np.sort(rng.choice(available, share, replace=False))
        moments.add(form.input_rows(np.asarray(x_f, np.float32), chosen), form.input_rows(np.asarray(x_q, np.float32), chosen))
    return moments


def _mean_error(weight: Array, rounded: Array, moments: compensation.Moments) -> Array:
    """What the bias must take up: mean float output less mean quantized output, of shape (n_channels,)."""
    f, q = moments.means
    shift = np.einsum("gnt,gt->gn", weight, f) - np.einsum("gnt,gt->gn", rounded, q)
    return np.asarray(shift.reshape(-1), np.float32)


@dataclass(frozen=True)
class _Problem:
    """One layer's rounding."""

    form: LinearForm
    weight: Array
    spec: QuantSpec
    moments: compensation.Moments
    config: Config

    def solve(self, scale: QuantParams, least: Array | None) -> tuple[NDArray[np.int32], QuantParams, Array]:
        """Integers, scales and the real weights that they stand for."""
        moment, cross = self.moments.covariances
        rows = np.asarray(self.form.weight_rows(self.weight), np.float32)
        target = compensation.corrected_target(rows, moment, cross, self.config.correction_damping)
        moment = compensation.damped(moment, self.config.rounding_damping)
        full = np.asarray(self.form.weight_from_rows(target), np.float32)
        base = quant_math.weight_scales(full, self.spec)
        best, best_cost, best_scale = None, None, None
        for ratio in _RATIOS:
            candidate = self._at_least(base * np.float32(ratio), least)
            per_row = self._per_row(candidate)
            q = compensation.compensated_rounding(target, per_row, moment, self.spec)
            value = compensation.cost(q * per_row[:, :, None] - target, moment)
            value = self._per_channel(value)
            if best is None:
                best, best_cost, best_scale = q, value, candidate
            else:
                better = value < best_cost
                best = np.where(self._rows_of(better)[:, :, None], q, best)
                best_scale = np.where(better, candidate, best_scale).astype(np.float32)
                best_cost = np.where(better, value, best_cost)
        per_row = self._per_row(best_scale)
        best = compensation.coordinate_descent(target, best, per_row, moment, self.spec, self.config.descent_passes)
        integers = np.asarray(self.form.weight_from_rows(best)).astype(np.int32)
        return integers, QuantParams(np.asarray(best_scale, np.float32)), full

    def _at_least(self, scale: Array, least: Array | None) -> Array:
        return scale if least is None or least.shape != scale.shape else np.maximum(scale, least)

    def _channels(self) -> NDArray[np.int64]:
        """Index of the scale of each row."""
        axis, shape = self.spec.axis, self.weight.shape
        index = np.zeros(shape, np.int64)
        if axis is not None:
            index += quant_math.along_axis(np.arange(shape[axis]), axis, len(shape))  # type: ignore[arg-type]
        return np.asarray(self.form.weight_rows(index))[:, :, 0]

    def _rows_of(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        return np.reshape(values, -1)[self._channels()]

    def _per_row(self, scale: Array) -> Array:
        return np.asarray(self._rows_of(scale), np.float32)

    def _per_channel(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        count = 1 if self.spec.axis is None else self.weight.shape[self.spec.axis]
        sums = np.bincount(self._channels().reshape(-1), values.reshape(-1), count)
        return sums[0] if self.spec.axis is None else sums
