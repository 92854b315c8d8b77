"""Layer-wise reconstruction: round layer by layer in closed form.

In topological order, each weight is first bent to make up for the errors upstream, then rounded with error
compensation, and the bias takes up the mean of what is left; see `eptq_onnx.numerics.compensation`. Float and
quantized network are walked once, side by side: the inputs of a layer follow from those of the layers before
it. Positions (pixels, tokens, samples) count by their Hessian scores: where the network's outputs do not
look, errors cost nothing. And they count, for each output of a layer, by the slope of the activation function
behind it: where a Relu is flat, errors are not seen.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from eptq_onnx.config import Config
from eptq_onnx.data.samples import Selection, spread
from eptq_onnx.execute.pieces import function_of
from eptq_onnx.execute.walk import Walk, affordable_batches
from eptq_onnx.graph import edit
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics import compensation, quant_math
from eptq_onnx.numerics.linear import LinearForm, OutputsApart, WeightForm, row_shape, scale_places
from eptq_onnx.numerics.moments import Moments, OutputNonlinearity, sampled_moments
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.numerics.types import Array, Float64, IntArray, QuantParams, QuantSpec
from eptq_onnx.ops import linear_form, pointwise, spec_of
from eptq_onnx.records import Layer, Network, Plan, Rounding, Scores

FLOAT_PASSES = 4.0
"""What walking both networks costs, in float passes over the samples."""
_ROWS_PER_TERM, _LEAST_ROWS, _MOST_ROWS = 64, 16_384, 60_000
_SYSTEMS = 1 + 2 * len(compensation.DAMPINGS)
"""Linear systems of each layer."""
_SLOWNESS, _OPERATIONS_A_LAYER = 4.0, 5e8
"""How much longer an operation takes here than in a large matrix product; and what else a layer takes."""
_RATIOS = {ScaleRule.ANY: (1.0, 0.85, 0.7, 0.55), ScaleRule.POWER_OF_TWO: (1.0, 0.5)}
"""Scales that are tried, in units of the one with the least squared error of the corrected weight."""
_REFITS = 2
"""Times that the scales are fitted to the integers and these descend again."""
_LEAST_UNIT = 1e-30
"""Of outputs whose function is looked at: smaller ones are nothing beside their bias."""
_HESSIAN_SHARE = 0.5
"""How much the positions' scores decide what a position counts; the rest all have in common."""
_MOST_APART, _BYTES_APART = 2e7, 64
"""Elements of the second moments of a layer's outputs apart from each other; and what each takes, with its
copies."""
_BITS_APART = 6
"""Of weights, at most: what rounding to more does is too small to be worth the time."""
_OUTPUT_DAMPING = 0.1
"""Added to the outputs' Hessian factor, in units of its mean diagonal: few probes leave directions unseen."""


def reconstruct(
    network: Network,
    quantized: ModelProto,
    start: Rounding,
    selection: Selection,
    config: Config,
    progress: Callable[[int, int], None],
) -> tuple[Rounding, dict[str, str]]:
    """Correct and round every layer on the inputs that it gets in the quantized network.

    Parameters
    ----------
    network : Network
        The ``positions`` of its scores tell which inputs count most, their ``outputs`` which errors of a
        layer add up in the network's outputs.
    quantized : ModelProto
        The QDQ model of ``start``; it gives the quantizers of the activations.
    start : Rounding
        What is not rounded here keeps its values.
    selection : Selection
        The samples to look at; of more than fit into 3 GiB, evenly spread ones are.
    config : Config
    progress : callable
        Called with layers done and layers in all.

    Returns
    -------
    Rounding
    dict of str to str
        Layers that keep their rounding, and why.

    Notes
    -----
    Input-error correction and sequential rounding follow OBQ (Frantar and Alistarh 2022) and GPTQ (Frantar et
    al. 2023).
    """
    model, plan, scores = network.model, network.plan, network.scores
    samples, indices = selection.samples, selection.indices
    size = samples.micro_batch()
    affordable = size * affordable_batches(specialize(model, samples.two_batches(size)), 2, config.max_memory)
    kept = indices[spread(len(indices), affordable)]
    batches = list(samples.batches(kept, size))
    feeds = [samples.take(part) for part in batches]
    student, names = _with_open_layers(quantized, plan)
    inputs = {n.name: n.input[0] for n in student.graph.node}
    exact, rough = Walk(model, feeds), Walk(student, feeds)
    view = GraphView(model)
    nodes = {n.name: n for n in view.nodes}
    integers, params, biases = dict(start.integers), dict(start.weights), dict(start.biases)
    targets: dict[str, Array] = {}
    skipped = unsolved(model, plan)
    for k, layer in enumerate(plan.layers):
        weight: Array = np.asarray(view.constant(layer.weight), np.float32)
        reached = exact.reach(layer.input), rough.reach(inputs[layer.node])
        form = linear_form(nodes[layer.node], view)
        problem: _Problem | None = None
        input_scale = start.activations[plan.quantizer_of[layer.input].name].scale
        if form is not None:
            importance = _importance(scores, layer, batches, [form.positions(x.shape) for x in reached[0]])
            # Rounded is the layer in units in which float32 holds its squares.
            units = quant_math.layer_units((x for side in reached for x in side), weight)
            reader = _reader(view, layer, form, start, config, units[0] * units[1])
            # Without a bias, the weights alone must get the mean right.
            moments = Moments(form.weight_rows(weight / units[1]), layer.bias is not None, reader)
            wanted, rng = (
                _wanted_rows(form.weight_rows(weight).shape[2]),
                np.random.default_rng((config.seed, k)),
            )
            sampled_moments(
                form,
                moments,
                (_over(reached[0], units[0]), _over(reached[1], units[0])),
                wanted,
                rng,
                importance,
            )
            if moments.is_empty:
                skipped.setdefault(layer.node, "no sample gives it a row of finite values")
            else:
                rows = OutputsApart(form, moments.apart) if moments.apart > 1 else form
                outputs = scores.outputs.get(layer.output) if scores is not None else None
                problem = _Problem(rows, weight, units, layer.weight_spec, moments, outputs, config)
            if problem is not None and layer.node not in skipped:
                least: Array = np.zeros(1, np.float32)
                if layer.bias is not None and plan.integer_bias:
                    least = quant_math.smallest_weight_scale(biases[layer.bias], input_scale)
                integers[layer.weight], params[layer.weight], target = problem.solve(least)
                if config.optimizes:
                    targets[layer.weight] = target
        rounded = quant_math.dequantize(integers[layer.weight], params[layer.weight], layer.weight_spec)
        rough.set_constant(names[layer.node][0], rounded)
        if layer.bias is not None:
            shift = 0 if problem is None else problem.mean_error(rounded)
            bias = biases[layer.bias] = biases[layer.bias] + shift
            grid = input_scale, params[layer.weight].scale
            rough.set_constant(
                names[layer.node][1], quant_math.round_bias(bias, *grid) if plan.integer_bias else bias
            )
        progress(k + 1, len(plan.layers))
    bent: Mapping[str, Array] = ChainMap(targets, start.targets)  # type: ignore[arg-type]  # it is only read
    return replace(start, integers=integers, weights=params, biases=biases, targets=bent), skipped


def operations(model: ModelProto, plan: Plan, config: Config) -> float:
    """Multiplications that `reconstruct` takes beside the walk, about, as fast as those of large matrix
    products.

    Parameters
    ----------
    model : ModelProto
        The normalized float model.
    plan : Plan
    config : Config
    """
    view = GraphView(model)
    nodes = {n.name: n for n in view.nodes}
    visits = len(_RATIOS[ScaleRule.ANY]) + 3 * config.descent_passes * (1 + _REFITS)
    total = 0.0
    for layer in plan.layers:
        form = linear_form(nodes[layer.node], view)
        if form is not None:
            groups, outputs, terms = row_shape(form, view.constant_shape(layer.weight))
            if _activation(view, layer, form, config) is not None:
                groups, outputs = groups * outputs, 1
            gathered = _wanted_rows(terms) * (terms + outputs)
            solved = _SYSTEMS * terms * (terms / 3 + outputs)
            total += groups * terms * (gathered + solved + visits * outputs * terms)
    return _SLOWNESS * total + _OPERATIONS_A_LAYER * len(plan.layers)


def _wanted_rows(terms: int) -> int:
    return int(np.clip(_ROWS_PER_TERM * terms, _LEAST_ROWS, _MOST_ROWS))


def _importance(
    scores: Scores | None, layer: Layer, batches: Sequence[NDArray[np.int64]], positions: Sequence[int]
) -> list[Array | None] | None:
    """How much every position of a layer's output counts, batch by batch; None where it was not scored."""
    if scores is None or layer.output not in scores.positions:
        return None
    known, rows = scores.positions[layer.output], {int(n): k for k, n in enumerate(scores.samples)}
    found: list[Array | None] = []
    for batch, count in zip(batches, positions, strict=True):
        scored = len(batch) * known.shape[1] == count and all(int(n) in rows for n in batch)
        own = known[[rows[int(n)] for n in batch]].reshape(-1) if scored else None
        found.append(None if own is None else (1 - _HESSIAN_SHARE) + np.float32(_HESSIAN_SHARE) * own)
    return found


@dataclass(frozen=True)
class _Activation:
    """The function of each output alone through which a layer acts; see `ops.pointwise`.

    Parameters
    ----------
    nodes : sequence of NodeProto
    end : str
        The tensor that they make.
    row : tuple of int
        Shape of the layer's output at one position, batch axis included.
    """

    nodes: Sequence[NodeProto]
    end: str
    row: tuple[int, ...]


def _activation(view: GraphView, layer: Layer, form: LinearForm, config: Config) -> _Activation | None:
    """None where there is no such function, or where the moments of all outputs apart would take too much, or
    bring too little."""
    groups, outputs, terms = row_shape(form, view.constant_shape(layer.weight))
    rank = len(view.shape(layer.output) or ())
    axis = layer.output_axis % max(rank, 1)
    # The walks take a quarter of the memory, too.
    most = (
        _MOST_APART
        if config.max_memory is None
        else min(_MOST_APART, config.max_memory // (4 * _BYTES_APART))
    )
    if not axis or layer.weight_spec.bits > _BITS_APART or groups * outputs * terms**2 > most:
        return None
    row = tuple(groups * outputs if k == axis else 1 for k in range(rank))

    def fits(constant: tuple[int, ...]) -> bool:
        whole = (1,) * (rank - len(constant)) + constant
        return len(whole) == rank and all(n in (1, size) for n, size in zip(whole, row, strict=True))

    nodes, end = pointwise(view, layer.output, fits)
    return _Activation(nodes, end, row) if nodes else None


def _over(values: Sequence[Array], unit: np.float32) -> Sequence[Array]:
    return values if unit == 1 else [value / unit for value in values]


def _reader(
    view: GraphView, layer: Layer, form: LinearForm, start: Rounding, config: Config, unit: np.float32
) -> OutputNonlinearity | None:
    """What reads a layer's outputs in such units, where that is a function of each alone."""
    activation = _activation(view, layer, form, config)
    if activation is None or not _LEAST_UNIT < unit < 1 / _LEAST_UNIT:
        return None
    function = function_of(view, activation.nodes, layer.output, activation.end)

    def of_groups(values: Array) -> Array:
        """Of outputs of shape (n_groups, n_rows, n_outputs)."""
        by_row = values.swapaxes(0, 1) * unit
        return function(by_row.reshape(-1, *activation.row[1:])).reshape(by_row.shape).swapaxes(0, 1)

    groups, outputs, _ = row_shape(form, view.constant_shape(layer.weight))
    bias = start.biases[layer.bias] if layer.bias is not None else np.zeros(groups * outputs, np.float32)
    return OutputNonlinearity(of_groups, np.asarray(bias / unit, np.float32).reshape(groups, outputs))


def unsolved(model: ModelProto, plan: Plan) -> dict[str, str]:
    """Layers that cannot be reconstructed, and why."""
    view = GraphView(model)
    nodes = {n.name: n for n in view.nodes}
    shared = plan.shared_weights
    found = {}
    for layer in plan.layers:
        if linear_form(nodes[layer.node], view) is None:
            found[layer.node] = f"this {layer.op_type} is not a plain matrix product"
        elif layer.weight in shared:
            found[layer.node] = f"its weight {layer.weight} is shared by several layers"
    return found


def _with_open_layers(quantized: ModelProto, plan: Plan) -> tuple[ModelProto, dict[str, tuple[str, str]]]:
    """The QDQ model with weights and biases to be set during the walk, and their names by layer node."""
    builder = edit.Builder(quantized, "closed_form/")
    layers = {layer.node: layer for layer in plan.layers}
    names: dict[str, tuple[str, str]] = {}
    for node in quantized.graph.node:
        copy = NodeProto()
        copy.CopyFrom(node)
        layer, row = layers.get(node.name), spec_of(node)
        if layer is not None:
            names[node.name] = builder.unique(f"{node.name}/weight"), builder.unique(f"{node.name}/bias")
            copy.input[row.weight or 0] = names[node.name][0]
            if layer.bias is not None and row.bias is not None:
                del copy.input[row.bias :]
                copy.input.append(names[node.name][1])
        builder.nodes.append(copy)
    return infer_shapes(edit.with_nodes(quantized, builder.nodes)), names


@dataclass(frozen=True)
class _Problem:
    """Rounding of one layer.

    Parameters
    ----------
    form : WeightForm
    weight : ndarray
    units : tuple of float32
        What the moments' inputs and weights are measured in.
    spec : QuantSpec
    moments : Moments
    outputs : ndarray or None
        The Hessian factor of the layer's outputs.
    config : Config
    """

    form: WeightForm
    weight: Array
    units: tuple[np.float32, np.float32]
    spec: QuantSpec
    moments: Moments
    outputs: Float64 | None
    config: Config

    def solve(self, least: Array) -> tuple[IntArray, QuantParams, Array]:
        """Integers, scales of at least ``least``, and the real weights that they stand for."""
        moment, cross, power = self.moments.covariances
        unit = self.units[1]
        rows, least = self.form.weight_rows(self.weight / unit), least / unit
        damping = self.config.correction_damping
        chosen = self._damping(rows) if damping is None else damping
        target = compensation.corrected_target(rows, moment, cross, power, chosen)
        moment = compensation.damped(moment, self.config.rounding_damping)
        full = self.form.weight_from_rows(target)
        base = quant_math.weight_scales(full, self.spec).reshape(-1)
        owners = scale_places(self.form, self.weight.shape, self.spec.axis)
        feedback = compensation.Feedback.of(moment)
        best = self._round(full, target, self._at_least(base, least), moment, feedback, owners)
        for ratio in _RATIOS[self.spec.scales][1:]:
            other = self._round(
                full, target, self._at_least(base * np.float32(ratio), least), moment, feedback, owners
            )
            better = other.cost < best.cost
            best = _Rounded(
                np.where(better[owners][:, :, None], other.integers, best.integers),
                np.where(better, other.scale, best.scale),
                np.where(better, other.zero, best.zero),
                np.where(better, other.cost, best.cost),
            )
        passes, limits = self.config.descent_passes, quant_math.limits(best.zero[owners], self.spec)
        integers, scale = self._in_turns(
            best.integers,
            best.scale,
            least,
            lambda q, s: compensation.coordinate_descent(target, q, s[owners], moment, limits, passes),
            lambda q, s: compensation.refitted_scale(target, q, s, moment, owners),
        )
        effect = self._output_moment(len(rows))
        if effect is not None:
            integers, scale = self._in_turns(
                integers,
                scale,
                least,
                lambda q, s: compensation.joint_descent(target, q, s[owners], moment, effect, limits, passes),
                lambda q, s: compensation.jointly_refitted_scale(target, q, s, moment, effect, owners),
            )
        places = ... if self.spec.axis is not None else 0
        params = self.spec.params(scale[places] * unit, best.zero[places])
        stored = self.form.weight_from_rows(integers + best.zero[owners][:, :, None])
        return stored.astype(self.spec.container), params, full * unit

    def mean_error(self, rounded: Array) -> Array:
        """What the bias must take up: mean float output less mean quantized output, of shape
        (n_channels,)."""
        own, of_weight = self.units
        return self.moments.mean_error(self.form.weight_rows(rounded / of_weight)) * (own * of_weight)

    def _damping(self, rows: Array) -> Float64:
        """That of the correction; outputs of a group have the same, also where they stand apart."""
        apart = self.moments.apart
        return np.repeat(
            compensation.best_damping(
                rows.reshape(-1, apart * rows.shape[1], rows.shape[2]), self.moments.halves
            ),
            apart,
        )

    def _output_moment(self, groups: int) -> Float64 | None:
        """G of every group, of shape (n_groups, n_outputs, n_outputs); None if it is unknown or 0, or a group
        has one output."""
        if self.outputs is None or len(self.outputs) == groups or np.trace(self.outputs) <= 0:
            return None
        own = np.arange(groups)
        blocks = self.outputs.reshape(groups, len(self.outputs) // groups, groups, -1)[own, :, own, :]
        return compensation.damped(blocks, _OUTPUT_DAMPING)

    def _in_turns(
        self,
        integers: Array,
        scale: Array,
        least: Array,
        descend: Callable[[Array, Array], Array],
        refit: Callable[[Array, Array], Array],
    ) -> tuple[Array, Array]:
        """Integers for the scales, then scales for the integers, and so on; the integers last."""
        integers = descend(integers, scale)
        for _ in range(_REFITS):
            scale = self._at_least(refit(integers, scale), least)
            integers = descend(integers, scale)
        return integers, scale

    def _at_least(self, scale: Array, least: Array) -> Array:
        """The allowed scales nearest to these, or at least so large: one a channel (or one in all), shape
        (n_scales,)."""
        scale, least = (self.spec.scales.nearest(scale.reshape(-1)), self.spec.scales.above(least))
        return np.maximum(scale, least if scale.size == least.size else least.max())

    def _round(
        self,
        full: Array,
        target: Array,
        scale: Array,
        moment: Float64,
        feedback: compensation.Feedback,
        owners: NDArray[np.int64],
    ) -> _Rounded:
        per_row, zero = scale[owners], quant_math.zero_points(full, scale, self.spec)
        integers = compensation.compensated_rounding(
            target, per_row, feedback, quant_math.limits(zero[owners], self.spec)
        )
        value = compensation.cost(integers * per_row[:, :, None] - target, moment)
        costs = np.zeros(scale.size)
        np.add.at(costs, owners, value)
        return _Rounded(integers, scale, zero, costs)


@dataclass(frozen=True)
class _Rounded:
    """Integers of every row, less their zero point, with the scale, zero point and cost of every channel."""

    integers: Array
    scale: Array
    zero: IntArray
    cost: NDArray[np.float64]
