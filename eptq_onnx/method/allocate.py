"""Mixed precision: choose the bit width of every weight under a budget, as an integer program.

Each candidate width of each layer is tried on the inputs of the float network: the weight is rounded with
error compensation, and the error of every output channel, on samples that the rounding has not seen, is
weighted by the channel's Hessian score. The effect on the network's outputs is measured for one width, by
running the float network with this one weight rounded; the effects of the other widths follow from the ratios
of their errors. The measurement is needed because scores treat the errors at all positions as independent,
although the errors of one weight add up, for instance in a mean over positions. The effects of layers add up,
so the best choice is an integer linear program, solved by SciPy's MILP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto, NodeProto
from scipy.optimize import Bounds, LinearConstraint, milp

from eptq_onnx.config import Budget, BudgetUnit, Config
from eptq_onnx.data.samples import Selection, spread
from eptq_onnx.errors import ConfigError
from eptq_onnx.execute.deviation import Deviation
from eptq_onnx.execute.walk import Walk, affordable_batches
from eptq_onnx.graph import edit
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics import compensation, quant_math
from eptq_onnx.numerics.formats import along_axis
from eptq_onnx.numerics.grid import Levels
from eptq_onnx.numerics.linear import LinearForm, scale_places
from eptq_onnx.numerics.moments import Moments, sampled_moments
from eptq_onnx.numerics.spec import QuantSpec
from eptq_onnx.numerics.types import Array, Float64
from eptq_onnx.ops import linear_form
from eptq_onnx.records import Layer, Network, Plan, Scores
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
        Multiplications per sample times the bits of the activations.
    """

    size: int
    effects: dict[int, float]
    operations: float = 0.0


@dataclass(frozen=True)
class FileSizes:
    """The bytes of the parts of the written file.

    Parameters
    ----------
    rest : int
        All but the weights.
    weights : mapping of str to mapping of int to int
        Weight to bit width to bytes.
    shared : mapping of int to int
        Bit width to the bytes that all weights of this width share.
    """

    rest: int
    weights: Mapping[str, Mapping[int, int]]
    shared: Mapping[int, int]


def allocate(
    network: Network,
    selection: Selection,
    target: Target,
    budget: Budget,
    config: Config,
    progress: Callable[[int, int], None],
    sizes: FileSizes | None = None,
) -> Plan:
    """Choose the bit width of every weight.

    Parameters
    ----------
    network : Network
        Its calibration gives the variance that normalizes each part of the outputs.
    selection : Selection
        The samples to run.
    target : Target
    budget : Budget
    config : Config
    progress : callable
        Called with the number of layers done and the total.
    sizes : FileSizes, optional
        For a budget of bytes.

    Returns
    -------
    Plan
        The same plan with other weight specs. Layers that are not plain matrix products get 8 bits.

    Raises
    ------
    ConfigError
        If no choice meets the budget.
    """
    plan = network.plan
    widths = solve(candidates(network, selection, target, config, progress), budget, sizes)
    layers = (
        replace(
            x, weight_spec=target.of(x.op_type).weight_spec(widths[x.weight], x.weight_spec.axis, x.depthwise)
        )
        for x in plan.layers
    )
    return replace(plan, layers=tuple(layers))


def candidates(
    network: Network,
    selection: Selection,
    target: Target,
    config: Config,
    progress: Callable[[int, int], None],
) -> dict[str, Candidates]:
    """Return the effect of every width of every weight on the outputs; parameters as in `allocate`."""
    model, plan, calibration = network.model, network.plan, network.calibration
    samples, indices = selection.samples, selection.indices
    size = samples.micro_batch()
    affordable = size * affordable_batches(specialize(model, samples.two_batches(size)), 1, config.max_memory)
    chosen = indices[spread(len(indices), affordable)]
    # At least two batches where possible: the weight is rounded on one half and judged on the other.
    at_once = size if samples.fixed_batch else min(size, max(1, len(chosen) // 2))
    parts = list(samples.batches(chosen, at_once))
    walk = Walk(model, [samples.take(part) for part in parts])
    view = GraphView(model)
    nodes = {n.name: n for n in view.nodes}
    deviation = Deviation(
        model, samples, np.concatenate(parts[1::2] or parts), SAMPLES, calibration.variance, config
    )
    quantizers = plan.quantizer_of
    weights: dict[str, Candidates] = {}
    for k, layer in enumerate(plan.layers):
        value: Array = np.asarray(view.constant(layer.weight), np.float32)
        form = linear_form(nodes[layer.node], view)
        inputs = walk.reach(layer.input)
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
            positions = sum(form.positions(x.shape) for x in inputs) / max(len(chosen), 1)
            known.operations += value.size * positions * quantizers[layer.input].spec.bits
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
        progress(k + 1, len(plan.layers))
    return weights


def solve(
    weights: Mapping[str, Candidates], budget: Budget, sizes: FileSizes | None = None
) -> dict[str, int]:
    """Return the widths that meet the budget with the least total effect.

    Parameters
    ----------
    weights : mapping of str to Candidates
    budget : Budget
    sizes : FileSizes, optional
        For a budget of bytes.

    Raises
    ------
    ConfigError
        If no choice meets the budget.
    """
    choices = [(name, bits) for name, weight in weights.items() for bits in weight.effects]
    costs, shared, rest = _costs(choices, weights, budget, sizes)
    columns = len(choices) + len(shared)
    once = np.zeros((len(weights), columns))
    rows = {name: i for i, name in enumerate(weights)}
    once[[rows[name] for name, _ in choices], np.arange(len(choices))] = 1
    # What the weights of a width share is there if any weight has that width.
    used = np.zeros((len(shared), columns))
    for k, width in enumerate(shared):
        used[k, [i for i, (_, bits) in enumerate(choices) if bits == width]] = 1
        used[k, len(choices) + k] = -len(weights)
    always = [LinearConstraint(once, 1, 1), *([LinearConstraint(used, -np.inf, 0)] if shared else [])]
    spent = np.array([*costs, *shared.values()]) / budget.amount
    effects = np.array([weights[name].effects[bits] for name, bits in choices] + [0.0] * len(shared))
    scaled = effects / max(float(effects.max()), 1e-30)
    found = _least(scaled, [*always, LinearConstraint(spent[None], -np.inf, 1 - rest / budget.amount)])
    if found is None:
        smallest = _least(spent, always)
        least = rest + (0.0 if smallest is None else float(spent @ smallest) * budget.amount)
        amount = f"{math.ceil(least)}" if budget.unit is BudgetUnit.BYTES else f"{least:.4g}"
        raise ConfigError(
            f"option budget={budget} cannot be met: the smallest widths ({min(b for _, b in choices)} bits) "
            f"take {budget.unit.value}={amount}; give at least that."
        )
    return {name: bits for (name, bits), x in zip(choices, found, strict=False) if x > 0.5}


def _least(objective: Float64, constraints: list[LinearConstraint]) -> Float64 | None:
    """Return the choice of columns with the smallest objective; None if there is none."""
    found = milp(
        objective,
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0},
    )
    return None if found.x is None else np.asarray(found.x, np.float64)


def _costs(
    choices: list[tuple[str, int]],
    weights: Mapping[str, Candidates],
    budget: Budget,
    sizes: FileSizes | None,
) -> tuple[list[float], Mapping[int, int], int]:
    """Return the costs in the budget's unit: of each choice, of each width that is used, and of all else."""
    if budget.unit is BudgetUnit.BYTES:
        if sizes is None:
            raise ValueError("a budget of bytes needs the sizes of the file's parts")
        widths = {bits for _, bits in choices}
        shared = {bits: count for bits, count in sizes.shared.items() if bits in widths}
        return [float(sizes.weights[name][bits]) for name, bits in choices], shared, sizes.rest
    if budget.unit is BudgetUnit.WEIGHTS:
        total = sum(w.size for w in weights.values())
        return [weights[name].size * bits / total for name, bits in choices], {}, 0
    return [weights[name].operations * bits for name, bits in choices], {}, 0


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
