"""Mixed precision: choose the bit width of every weight within limits, by an integer program.

Each candidate width of each layer is tried on the inputs of the float network: the weight is rounded with
error compensation, and the error of every output channel, on samples that the rounding has not seen, is
weighted by the channel's Hessian score. The effect on the network's outputs is measured for one width, by
running the float network with this one weight rounded; the effects of the other widths follow from the ratios
of their errors. The measurement is needed because scores treat the errors at all positions as independent,
although the errors of one weight add up, for instance in a mean over positions. The effects of layers add up,
so the best choice is an integer linear program; see `eptq_onnx.program`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto, NodeProto

from eptq_onnx.config import Budget, BudgetUnit, Config
from eptq_onnx.data.samples import Selection
from eptq_onnx.errors import ConfigError
from eptq_onnx.execute.deviation import Deviation
from eptq_onnx.execute.walkers import Walkers, batches_on_the_way
from eptq_onnx.graph import edit
from eptq_onnx.graph.file_count import FileSizes
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics import compensation, quant_math
from eptq_onnx.numerics.formats import along_axis
from eptq_onnx.numerics.grid import Levels
from eptq_onnx.numerics.linear import LinearForm, scale_places
from eptq_onnx.numerics.moments import Moments, sampled_moments
from eptq_onnx.numerics.spec import QuantSpec
from eptq_onnx.numerics.types import Array
from eptq_onnx.ops import linear_form
from eptq_onnx.placement import FrontPoint, InFloat, Representation
from eptq_onnx.program import BYTES, EXACT, NOISE, Option, Program, Shared
from eptq_onnx.program import solve as least_of
from eptq_onnx.records import DYNAMIC_BITS, Layer, Network, Plan, Scores
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


_FLOAT, _ON = Representation.FLOAT, Representation.INTEGERS
_POINTS = 9
"""Sizes of the file at which the least noise is reported."""


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


@dataclass(frozen=True)
class Goal:
    """What widths are chosen for.

    Parameters
    ----------
    minimized : str
        ``noise`` or ``bytes``.
    budgets : tuple of Budget
        Limits that the user gave.
    most_noise : float, optional
        Limit of the noise of weights and activations together.
    activation_noise : float
        What quantized activations cause of it.
    """

    minimized: str
    budgets: tuple[Budget, ...] = ()
    most_noise: float = math.inf
    activation_noise: float = 0.0

    @property
    def other_limits(self) -> dict[str, float]:
        """Return the limit of the weights' noise, if there is one."""
        left = self.most_noise - self.activation_noise
        return {NOISE: left} if math.isfinite(left) else {}

    @property
    def bytes(self) -> int | None:
        """Return the limit of the file's bytes, if there is one."""
        return next((int(b.amount) for b in self.budgets if b.unit is BudgetUnit.BYTES), None)

    @property
    def counts_bytes(self) -> bool:
        """True if the bytes of the file are minimized or limited."""
        return self.minimized == BYTES or self.bytes is not None

    def with_bytes(self, amount: int | None) -> Goal:
        """Return the goal with another limit of the file's bytes, or without one."""
        others = tuple(b for b in self.budgets if b.unit is not BudgetUnit.BYTES)
        own = () if amount is None else (Budget(unit=BudgetUnit.BYTES, amount=amount),)
        return replace(self, budgets=(*own, *others))


def with_widths(plan: Plan, widths: Mapping[str, int], target: Target) -> Plan:
    """Return a plan whose weights have other widths."""
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


def program_of(
    weights: Mapping[str, Candidates],
    sizes: FileSizes,
    in_float: Mapping[str, InFloat] | None = None,
    mean: float = 0.0,
) -> Program:
    """Return the integer program whose regions are weights, with their widths as options.

    What the file has besides weights and the tables of their widths counts in no option.

    Parameters
    ----------
    weights : mapping of str to Candidates
    sizes : FileSizes
    in_float : mapping of str to InFloat, optional
        Weights whose layers may compute in float, on float values or on stored integers.
    mean : float
        Bits at which a float weight counts, so that it does not change whether the others keep within a
        limit of that many mean bits.
    """
    total = sum(w.size for w in weights.values())

    def at(name: str, bits: int, place: Representation, more: int = 0) -> Option:
        """Return the option of a width, for layers that compute in float or on integers."""
        weight = weights[name]
        costs = {
            NOISE: weight.effects[bits],
            BudgetUnit.BYTES.value: float(sizes.weights[name][bits] + more),
            BudgetUnit.WEIGHTS.value: weight.size * bits / total,
            BudgetUnit.BITOPS.value: weight.operations * bits if place is _ON else 0.0,
        }
        return Option(place, place, costs, bits)

    def exact(name: str, count: int) -> Option:
        """Return the option of float values."""
        costs = {
            NOISE: 0.0,
            EXACT: float(weights[name].size),
            BudgetUnit.BYTES.value: float(count),
            BudgetUnit.WEIGHTS.value: weights[name].size * mean / total,
            BudgetUnit.BITOPS.value: 0.0,
        }
        return Option(_FLOAT, _FLOAT, costs)

    def floats(name: str, widths: Iterable[int]) -> Iterator[Option]:
        own = (in_float or {}).get(name)
        if own is not None:
            yield exact(name, own.exact)
            if own.stored is not None:
                yield from (at(name, bits, _FLOAT, own.stored) for bits in widths)

    options = tuple(
        (*floats(name, weight.effects), *(at(name, bits, _ON) for bits in weight.effects))
        for name, weight in weights.items()
    )
    shared = []
    for width, count in sizes.shared.items():
        users = [(k, o) for k, own in enumerate(options) for o, x in enumerate(own) if x.bits == width]
        if users:
            shared.append(Shared(tuple(users), {BudgetUnit.BYTES.value: float(count)}))
    return Program(options, (), shared=tuple(shared))


def solve(weights: Mapping[str, Candidates], goal: Goal, sizes: FileSizes) -> dict[str, int]:
    """Return the widths that meet the goal.

    Raises
    ------
    ConfigError
        If no choice keeps within the limits.
    """
    program = program_of(weights, sizes)
    limits = {**{b.unit.value: b.amount for b in goal.budgets}, **goal.other_limits}
    found = least_of(program, goal.minimized, _without_rest(limits, sizes))
    if found is None:
        raise _unmet(program, goal, sizes)
    return {name: own[o].bits for name, own, o in zip(weights, program.options, found.options, strict=True)}


def keeps_within(weights: Mapping[str, Candidates], goal: Goal, widths: Mapping[str, int]) -> bool:
    """Return True if widths keep within the budgets, but for that of bytes."""
    total = sum(w.size for w in weights.values())
    spent = {
        BudgetUnit.WEIGHTS: sum(w.size * widths[name] for name, w in weights.items()) / total,
        BudgetUnit.BITOPS: sum(w.operations * widths[name] for name, w in weights.items()),
    }
    return all(spent.get(b.unit, 0.0) <= b.amount for b in goal.budgets)


def _without_rest(limits: Mapping[str, float], sizes: FileSizes) -> dict[str, float]:
    rest = {BudgetUnit.BYTES.value: float(sizes.rest)}
    return {name: amount - rest.get(name, 0.0) for name, amount in limits.items()}


def _unmet(program: Program, goal: Goal, sizes: FileSizes) -> ConfigError:
    """Return the error for the first limit that no choice meets alone, or for all together."""
    smallest = min(x.bits for own in program.options for x in own)
    for budget in goal.budgets:
        found = least_of(program, budget.unit.value)
        is_bytes = budget.unit is BudgetUnit.BYTES
        least = (0.0 if found is None else found.amount) + (sizes.rest if is_bytes else 0)
        if least > budget.amount:
            amount = f"{math.ceil(least - 1e-6)}" if is_bytes else f"{least:.4g}"
            return ConfigError(
                f"option budget={budget} cannot be met: the smallest widths ({smallest} bits) "
                f"take {budget.unit.value}={amount}; give at least that."
            )
    noise = least_of(program, NOISE)
    if noise is not None and noise.amount > goal.other_limits.get(NOISE, math.inf):
        return ConfigError(
            f"option max_noise={goal.most_noise:g} leaves weights a noise of "
            f"{max(goal.other_limits[NOISE], 0.0):.2g} of the outputs' power, and the largest widths cause "
            f"{noise.amount:.2g}: give more, or leave objective={goal.minimized} out."
        )
    given = ", ".join([*map(str, goal.budgets), *(f"noise={a:.2g}" for a in goal.other_limits.values())])
    return ConfigError(f"the limits {given} cannot be met together: raise one of them.")


def front_of(
    weights: Mapping[str, Candidates], sizes: FileSizes, widths: Mapping[str, int]
) -> tuple[FrontPoint, ...]:
    """Return the least noise at several sizes of the file, from the smallest to that of the least noise.

    Parameters
    ----------
    weights : mapping of str to Candidates
    sizes : FileSizes
    widths : mapping of str to int
        The choice that was taken, which is one of the points.
    """
    program, unit = program_of(weights, sizes), BudgetUnit.BYTES.value
    smallest, quietest = least_of(program, unit), least_of(program, NOISE)
    points: dict[tuple[int, ...], bool] = {}
    if smallest is not None and quietest is not None:
        for amount in np.linspace(smallest.totals[unit], quietest.totals[unit], _POINTS):
            found = least_of(program, NOISE, {unit: float(amount)})
            if found is not None:
                points[tuple(own[o].bits for own, o in zip(program.options, found.options, strict=True))] = (
                    False
                )
    points[tuple(widths[name] for name in weights)] = True
    total = sum(w.size for w in weights.values())
    front = []
    for bits, chosen in points.items():
        own = dict(zip(weights, bits, strict=True))
        noise = sum(weights[name].effects[b] for name, b in own.items())
        mean = sum(weights[name].size * b for name, b in own.items()) / total
        front.append(FrontPoint(noise, bytes=sizes.total(own), bits=mean, chosen=chosen))
    return tuple(sorted(front, key=lambda point: (point.bytes or 0, -point.noise)))


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
