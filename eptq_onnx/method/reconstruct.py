"""Layer-wise reconstruction: correct and round one layer at a time, without iterating over the network.

In topological order, each weight is first corrected for the errors upstream and then rounded with error
compensation, and the bias absorbs the mean of the remaining error; see `eptq_onnx.numerics.compensation`.
Float and quantized network are walked once, side by side: the inputs of a layer follow from those of the
layers before it. Positions (pixels, tokens, samples) are weighted by their Hessian scores, since errors that
do not reach the network's outputs cost nothing. For each output of a layer they are also weighted by the
slope of the activation function behind it: where a Relu is flat, errors do not pass.
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
from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.linear import LinearForm, OutputsApart, row_shape
from eptq_onnx.numerics.moments import Moments, OutputNonlinearity, sampled_moments
from eptq_onnx.numerics.reconstruction import FEW_BITS, RATIOS, REFITS, Damping, LayerProblem
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.numerics.types import Array
from eptq_onnx.ops import linear_form, pointwise, spec_of
from eptq_onnx.records import Layer, Network, Plan, Rounding, Scores

FLOAT_PASSES = 4.0
"""Cost of walking both networks, in float passes over the samples."""
_ROWS_FEW_BITS, _ROWS_MANY_BITS = (64, 16_384, 60_000), (16, 1024, 16_384)
"""Input rows sampled per term of a layer, and their limits, for weights of at most 6 bits and of more."""
_SYSTEMS = 10
"""Linear systems solved per layer: feedback, target, and about 4 dampings on each half of the rows."""
_SLOWNESS, _OPERATIONS_A_LAYER = 4.0, 5e8
"""Time of an operation relative to one in a large matrix product, and overhead per layer in operations."""
_LEAST_UNIT = 1e-30
"""Smallest unit of outputs whose nonlinearity is used: below it, outputs vanish beside their bias."""
_HESSIAN_SHARE = 0.5
"""Share of a position's weight that its score determines; the rest is common to all positions."""
_MOST_APART, _BYTES_APART = 2e7, 64
"""Limit on the elements of second moments that are separate per output, and bytes of each with its copies."""


def reconstruct(
    network: Network,
    quantized: ModelProto,
    start: Rounding,
    selection: Selection,
    config: Config,
    progress: Callable[[int, int], None],
) -> tuple[Rounding, dict[str, str]]:
    """Correct and round every layer on the inputs that it receives in the quantized network.

    Parameters
    ----------
    network : Network
        In its scores, ``positions`` weights the inputs, and ``outputs`` says which errors of a layer add up
        in the network's outputs.
    quantized : ModelProto
        The QDQ model of ``start``, which provides the quantizers of the activations.
    start : Rounding
        Initial rounding; layers that are not reconstructed keep it.
    selection : Selection
        The samples to use; an evenly spread subset if they take more than 3 GiB.
    config : Config
    progress : callable
        Called with the number of layers done and the total.

    Returns
    -------
    Rounding
    dict of str to str
        Layers that keep their rounding, each with the reason.

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
    exact, quantized_walk = Walk(model, feeds), Walk(student, feeds)
    view = GraphView(model)
    nodes = {n.name: n for n in view.nodes}
    integers, grids, biases = dict(start.integers), dict(start.weights), dict(start.biases)
    targets: dict[str, Array] = {}
    skipped = unsolved(model, plan)
    for k, layer in enumerate(plan.layers):
        weight: Array = np.asarray(view.constant(layer.weight), np.float32)
        reached = exact.reach(layer.input), quantized_walk.reach(inputs[layer.node])
        form = linear_form(nodes[layer.node], view)
        problem: LayerProblem | None = None
        input_scale = start.grids[plan.quantizer_of[layer.input].name].scale
        if form is not None:
            importance = _importance(scores, layer, batches, [form.positions(x.shape) for x in reached[0]])
            # Work in units in which float32 holds the squares.
            units = quant_math.layer_units((x for side in reached for x in side), weight)
            nonlinearity = _nonlinearity(view, layer, form, start, config, units[0] * units[1])
            # Without a bias, the weights alone must reproduce the mean.
            moments = Moments(form.weight_rows(weight / units[1]), layer.bias is not None, nonlinearity)
            wanted, rng = (
                _wanted_rows(form.weight_rows(weight).shape[2], layer.weight_spec.bits),
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
                skipped.setdefault(layer.node, "no sample gives it finite inputs")
            else:
                rows = OutputsApart(form, moments.apart) if moments.apart > 1 else form
                outputs = scores.outputs.get(layer.output) if scores is not None else None
                problem = LayerProblem(
                    rows,
                    weight,
                    units,
                    layer.weight_spec,
                    moments,
                    outputs,
                    Damping(config.correction_damping, config.rounding_damping),
                    config.descent_passes,
                )
            if problem is not None and layer.node not in skipped:
                least: Array = np.zeros(1, np.float32)
                if layer.bias is not None and plan.bias is not None:
                    least = plan.bias.least_weight_scale(biases[layer.bias], input_scale)
                integers[layer.weight], grids[layer.weight], target = problem.solve(least)
                if config.optimizes:
                    targets[layer.weight] = target
        rounded = grids[layer.weight].dequantize(integers[layer.weight])
        quantized_walk.set_constant(names[layer.node][0], rounded)
        if layer.bias is not None:
            shift = 0 if problem is None else problem.mean_error(rounded)
            bias = biases[layer.bias] = biases[layer.bias] + shift
            grid = input_scale, grids[layer.weight].scale
            quantized_walk.set_constant(
                names[layer.node][1], plan.bias.round(bias, *grid) if plan.bias is not None else bias
            )
        progress(k + 1, len(plan.layers))
    corrected: Mapping[str, Array] = ChainMap(targets, start.targets)  # type: ignore[arg-type]  # it is only read
    return replace(start, integers=integers, weights=grids, biases=biases, targets=corrected), skipped


def operations(model: ModelProto, plan: Plan, config: Config) -> float:
    """Return the approximate multiplications of `reconstruct` besides the walk.

    They are counted in multiplications of a large matrix product.

    Parameters
    ----------
    model : ModelProto
        The normalized float model.
    plan : Plan
    config : Config
    """
    view = GraphView(model)
    nodes = {n.name: n for n in view.nodes}
    most = len(RATIOS[ScaleRule.ANY]) + 3 * config.descent_passes * (1 + REFITS)
    total = 0.0
    for layer in plan.layers:
        form = linear_form(nodes[layer.node], view)
        if form is not None:
            few = layer.weight_spec.bits <= FEW_BITS
            visits = most if few else 4
            groups, outputs, terms = row_shape(form, view.constant_shape(layer.weight))
            if _activation(view, layer, form, config) is not None:
                groups, outputs = groups * outputs, 1
            gathered = _wanted_rows(terms, layer.weight_spec.bits) * (terms + outputs)
            solved = _SYSTEMS * terms * (terms / 3 + outputs)
            total += groups * terms * (gathered + solved + visits * outputs * terms)
    return _SLOWNESS * total + _OPERATIONS_A_LAYER * len(plan.layers)


def _wanted_rows(terms: int, bits: int) -> int:
    per_term, least, most = _ROWS_FEW_BITS if bits <= FEW_BITS else _ROWS_MANY_BITS
    return int(np.clip(per_term * terms, least, most))


def _importance(
    scores: Scores | None, layer: Layer, batches: Sequence[NDArray[np.int64]], positions: Sequence[int]
) -> list[Array | None] | None:
    """Return the weight of every position of a layer's output, batch by batch; None if it was not scored."""
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
    """The elementwise function through which a layer acts on the rest of the network; see `ops.pointwise`.

    Parameters
    ----------
    nodes : sequence of NodeProto
    end : str
        The tensor that the nodes produce.
    row : tuple of int
        Shape of the layer's output at one position, including the batch axis.
    """

    nodes: Sequence[NodeProto]
    end: str
    row: tuple[int, ...]


def _activation(view: GraphView, layer: Layer, form: LinearForm, config: Config) -> _Activation | None:
    """Return the elementwise function behind a layer, or None.

    None also where separate moments for all outputs would take too much memory or bring too little.
    """
    groups, outputs, terms = row_shape(form, view.constant_shape(layer.weight))
    rank = len(view.shape(layer.output) or ())
    axis = layer.output_axis % max(rank, 1)
    # The walks take another quarter of the memory.
    most = (
        _MOST_APART
        if config.max_memory is None
        else min(_MOST_APART, config.max_memory // (4 * _BYTES_APART))
    )
    if not axis or layer.weight_spec.bits > FEW_BITS or groups * outputs * terms**2 > most:
        return None
    row = tuple(groups * outputs if k == axis else 1 for k in range(rank))

    def fits(constant: tuple[int, ...]) -> bool:
        whole = (1,) * (rank - len(constant)) + constant
        return len(whole) == rank and all(n in (1, size) for n, size in zip(whole, row, strict=True))

    nodes, end = pointwise(view, layer.output, fits)
    return _Activation(nodes, end, row) if nodes else None


def _over(values: Sequence[Array], unit: np.float32) -> Sequence[Array]:
    return values if unit == 1 else [value / unit for value in values]


def _nonlinearity(
    view: GraphView, layer: Layer, form: LinearForm, start: Rounding, config: Config, unit: np.float32
) -> OutputNonlinearity | None:
    """Return the elementwise function behind a layer, for outputs in the given units, or None."""
    activation = _activation(view, layer, form, config)
    if activation is None or not _LEAST_UNIT < unit < 1 / _LEAST_UNIT:
        return None
    function = function_of(view, activation.nodes, layer.output, activation.end)

    def of_groups(values: Array) -> Array:
        """Apply the function to outputs of shape (n_groups, n_rows, n_outputs)."""
        by_row = values.swapaxes(0, 1) * unit
        return function(by_row.reshape(-1, *activation.row[1:])).reshape(by_row.shape).swapaxes(0, 1)

    groups, outputs, _ = row_shape(form, view.constant_shape(layer.weight))
    bias = start.biases[layer.bias] if layer.bias is not None else np.zeros(groups * outputs, np.float32)
    return OutputNonlinearity(of_groups, np.asarray(bias / unit, np.float32).reshape(groups, outputs))


def unsolved(model: ModelProto, plan: Plan) -> dict[str, str]:
    """Return the layers that cannot be reconstructed, each with the reason."""
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
    """Return the QDQ model with weights and biases as inputs of the walk, and their names by layer node."""
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
