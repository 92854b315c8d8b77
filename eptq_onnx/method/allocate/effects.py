"""Measure what every width of every weight does to the outputs; see `eptq_onnx.method.allocate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto

from eptq_onnx.config import Config
from eptq_onnx.data.samples import Selection
from eptq_onnx.execute.deviation import Deviation
from eptq_onnx.execute.walkers import Walkers, batches_on_the_way
from eptq_onnx.graph import edit
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics import compensation, quant_math
from eptq_onnx.numerics.formats import along_axis
from eptq_onnx.numerics.grid import Levels
from eptq_onnx.numerics.linear import LinearForm, scale_places
from eptq_onnx.numerics.moments import Moments, sampled_moments
from eptq_onnx.numerics.spec import QuantSpec
from eptq_onnx.numerics.types import Array
from eptq_onnx.ops import linear_form
from eptq_onnx.records import DYNAMIC_BITS, Layer, Network, Scores
from eptq_onnx.targets import Target

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Candidate bit widths."""
_ROWS = 30_000
"""Input rows sampled per layer."""
_MEASURED = 4
"""Bit width at which the effect on the outputs is measured."""
SAMPLES = 32
"""Samples on which the network is run once per layer."""
_MOST_NOISE = 10.0
"""Cap on a measured noise-to-signal ratio: beyond it, outputs are useless anyway."""
_LEAST = 1e-6
"""Smallest error at the measured width, as a share of the layer's largest.

Below it the weight fits the grid at that width; errors at other widths are then taken relative to the
variance of the layer's output.
"""


@dataclass
class Candidates:
    """Candidate widths of one weight tensor; the contributions of all layers that share it add up.

    Parameters
    ----------
    size : int
        Elements.
    effects : dict of int to float
        Bit width to the noise it causes at the outputs.
    operations : float
        Multiplications per sample on integers, times the bits of the activations.
    """

    size: int
    effects: dict[int, float]
    operations: float = 0.0


def candidates(
    network: Network,
    selection: Selection,
    target: Target,
    config: Config,
    progress: Callable[[int, int], None],
) -> dict[str, Candidates]:
    """Return the effect of every width of every weight on the outputs.

    Layers that are not plain matrix products have 8 bits as their only width.

    Parameters
    ----------
    network : Network
        Its calibration gives the variance that normalizes each part of the outputs.
    selection : Selection
        The samples to run.
    target : Target
    config : Config
    progress : callable
        Called with the number of layers done and the total.
    """
    model, plan, calibration = network.model, network.plan, network.calibration
    samples, indices = selection.samples, selection.indices
    size = samples.micro_batch()
    # At least two batches where possible: the weight is rounded on one half and judged on the other.
    at_once = size if samples.fixed_batch else min(size, max(1, len(indices) // 2))
    parts = list(samples.batches(indices, at_once))
    shapes, tensors = samples.two_batches(at_once), [layer.input for layer in plan.layers]
    counts = batches_on_the_way(model, shapes, tensors, len(parts), 1, config.max_memory)
    walkers = Walkers((model,), parts, samples.take, counts)
    view = GraphView(model)
    nodes = {n.name: n for n in view.nodes}
    judged = np.concatenate(walkers.batches[1::2] or walkers.batches)
    deviation = Deviation(model, samples, judged, SAMPLES, calibration.variance, config)
    quantizers = plan.quantizer_of
    weights: dict[str, Candidates] = {}
    for k, layer in enumerate(plan.layers):
        value: Array = np.asarray(view.constant(layer.weight), np.float32)
        form = linear_form(nodes[layer.node], view)
        reached = walkers.reach(k, layer.input)
        inputs = reached.exact
        rows: Moments | None = None
        own, of_weight = quant_math.layer_units(inputs, value)
        if form is not None:
            inputs = inputs if own == 1 else [x / own for x in inputs]
            rng = np.random.default_rng((config.seed, k))
            rows = sampled_moments(
                form, Moments(form.weight_rows(value / of_weight)), (inputs, inputs), _ROWS, rng
            )
        if form is None:
            weights.setdefault(layer.weight, Candidates(value.size, {8: 0.0}))
        elif rows is None or rows.is_empty:
            # No finite value reaches this layer: any width will do.
            weights.setdefault(layer.weight, Candidates(value.size, dict.fromkeys(WIDTHS, 0.0)))
        else:
            known = weights.setdefault(layer.weight, Candidates(value.size, dict.fromkeys(WIDTHS, 0.0)))
            positions = sum(form.positions(x.shape) for x in inputs) / max(sum(map(len, reached.batches)), 1)
            if not layer.stored:
                bits = DYNAMIC_BITS if layer.dynamic else quantizers[layer.input].spec.bits
                known.operations += value.size * positions * bits
            specs = {
                bits: target.of(layer.op_type).weight_spec(bits, layer.weight_spec.axis, layer.depthwise)
                for bits in known.effects
            }
            errors, rounded = _tried(form, value / of_weight, rows, specs, config)
            importance = _importance(layer, network.scores, errors[_MEASURED].size)
            square = (float(own) * float(of_weight)) ** 2
            foreseen = {bits: float((error * importance).sum()) * square for bits, error in errors.items()}
            if deviation.parts and foreseen[_MEASURED] > _LEAST * max(foreseen.values()):
                shift = rows.mean_error(form.weight_rows(rounded)) * (own * of_weight)
                measured = deviation(
                    _with_one_rounded(model, view, nodes[layer.node], layer, rounded * of_weight, shift)
                )
                unit = min(measured, _MOST_NOISE) / foreseen[_MEASURED]
            else:
                unit = 1 / max(float(importance.sum()) * calibration.variance[layer.output], 1e-30)
            for bits, effect in foreseen.items():
                known.effects[bits] += unit * effect
        del reached, inputs
        progress(k + 1, len(plan.layers))
    return weights


def _tried(
    form: LinearForm, weight: Array, moments: Moments, specs: Mapping[int, QuantSpec], config: Config
) -> tuple[dict[int, Array], Array]:
    """Round at each width and return the errors, and the weight rounded at the measured width.

    Returns
    -------
    dict of int to ndarray of shape (n_channels,)
        Bit width to the mean squared error of each output channel after the bias has absorbed its mean.
    ndarray
        The rounded weight at the measured width.
    """
    # A weight with more terms than there are rows can be rounded to fit those rows exactly, so the error is
    # measured on others.
    seen, unseen = (moment for moment, _, _ in moments.halves or 2 * (moments.covariances,))
    feedback = compensation.Feedback.of(compensation.damped(seen, config.rounding_damping))
    rows = form.weight_rows(weight)
    errors, rounded = {}, weight
    for bits, spec in specs.items():
        scale, owners = quant_math.weight_scales(weight, spec), scale_places(form, weight.shape, spec.axis)
        per_row, zero = (
            scale.reshape(-1)[owners],
            quant_math.zero_points(weight, scale, spec).reshape(-1)[owners],
        )
        integers = compensation.compensated_rounding(rows, per_row, feedback, Levels(spec.format, zero))
        values = integers * per_row[:, :, None]
        errors[bits] = np.asarray(compensation.cost(values - rows, unseen).reshape(-1), np.float32)
        if bits == _MEASURED:
            rounded = np.asarray(form.weight_from_rows(values), np.float32)
    return errors, rounded


def _with_one_rounded(
    model: ModelProto, view: GraphView, node: NodeProto, layer: Layer, rounded: Array, shift: Array
) -> ModelProto:
    """Return the float network with one layer's weight rounded and its mean output error corrected."""
    # If the rank of the output is unknown, use that of the weight; outputs of matrix products may have more
    # leading axes.
    rank = len(view.shape(layer.output) or view.constant_shape(layer.weight))
    build = edit.Builder(model)
    raw = build.unique(f"{layer.output}_raw")
    copy = edit.renamed(
        node, {layer.output: raw, layer.weight: build.constant(rounded, f"{layer.weight}_rounded")}
    )
    build.add("Add", [raw, along_axis(shift, layer.output_axis % rank, rank)], layer.output)
    nodes = [
        n for other in view.nodes for n in ([copy, *build.nodes] if other.name == node.name else [other])
    ]
    return edit.with_nodes(model, nodes, build.initializers)


def _importance(layer: Layer, scores: Scores | None, channels: int) -> Array:
    """Return how much a squared error of 1 in each channel counts, relative to the other channels."""
    if (
        scores is not None
        and layer.output in scores.channels
        and scores.channels[layer.output].shape[1] == channels
    ):
        table = scores.channels[layer.output]
        return np.asarray((table / quant_math.unit(table)).mean(axis=0), np.float32)
    return np.ones(channels, np.float32)
