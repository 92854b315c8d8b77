"""The problem of one layer, or of several that read one tensor: its moments, and what it is solved with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from eptq_onnx.config import Config
from eptq_onnx.execute.pieces import function_of
from eptq_onnx.execute.walkers import Reached
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.biases import BiasSpec
from eptq_onnx.numerics.formats import PerAxis, PerBlock
from eptq_onnx.numerics.grid import Grid
from eptq_onnx.numerics.linear import LinearForm, OutputsApart, Rows, WeightForm, row_shape, scale_places
from eptq_onnx.numerics.moments import Moments, OutputNonlinearity, sampled_moments
from eptq_onnx.numerics.reconstruction import Damping, LayerProblem
from eptq_onnx.numerics.spec import QuantSpec
from eptq_onnx.numerics.types import Array, Values
from eptq_onnx.ops import linear_form, pointwise
from eptq_onnx.records import Layer, Plan, Rounding, Scores

_ROWS_FEW_BITS, _ROWS_MANY_BITS = (64, 16_384, 60_000), (16, 1024, 16_384)
"""Input rows sampled per term of a layer, and their limits, for weights of at most 6 bits and of more."""
_LEAST_UNIT = 1e-30
"""Smallest unit of outputs whose nonlinearity is used: below it, outputs vanish beside their bias."""
_HESSIAN_SHARE = 0.5
"""Share of a position's weight that its score determines; the rest is common to all positions."""
_MOST_APART, _BYTES_APART = 2e7, 64
"""Limit on the elements of second moments that are separate per output, and bytes of each with its copies."""


@dataclass(frozen=True)
class Solution:
    """What the moments say about one layer.

    Parameters
    ----------
    form : WeightForm
    moments : Moments
    units : tuple of float32
        Units of the moments' inputs and of the weight.
    outputs : slice
        The layer's outputs among those of the moments.
    rounded : tuple of (ndarray, Grid, ndarray), or None
        Values, grid and unrounded weight; None if they are not wanted.
    """

    form: WeightForm
    moments: Moments
    units: tuple[np.float32, np.float32]
    outputs: slice
    rounded: tuple[Values, Grid, Array] | None

    def mean_error(self, rounded: Array) -> Array:
        """Return the mean float output minus the mean quantized output, for the bias to absorb.

        The shape is (n_channels,).
        """
        own, of_weight = self.units
        return self.moments.mean_error(self.form.weight_rows(rounded / of_weight), self.outputs) * (
            own * of_weight
        )


@dataclass(frozen=True)
class BiasGrid:
    """How the bias of a layer is stored: as integers, or as floats where there is no ``spec``.

    Parameters
    ----------
    spec : BiasSpec or None
    input_scale : ndarray, shape ()
    """

    spec: BiasSpec | None
    input_scale: Array

    @classmethod
    def of(cls, layer: Layer, plan: Plan, start: Rounding) -> BiasGrid:
        """Return that of a layer."""
        if plan.bias is None or not layer.static:
            return cls(None, np.ones((), np.float32))
        return cls(plan.bias, plan.input_scales({n: g.scale for n, g in start.grids.items()})[layer.node])

    def least_weight_scale(self, bias: Array) -> Array:
        """Return the scales of the weight below which the bias would overflow."""
        if self.spec is None:
            return np.zeros(1, np.float32)
        return self.spec.least_weight_scale(bias, self.input_scale)

    def round(self, bias: Array, weight_scale: Array) -> Array:
        """Return the values that are stored."""
        return bias if self.spec is None else self.spec.round(bias, self.input_scale, weight_scale)


@dataclass(frozen=True)
class Solver:
    """Solves layers from their inputs in both networks.

    Parameters
    ----------
    view : GraphView
        The float model.
    nodes : mapping of str to NodeProto
        Its nodes by name.
    plan : Plan
    start : Rounding
    config : Config
    scores : Scores or None
    """

    view: GraphView
    nodes: Mapping[str, NodeProto]
    plan: Plan
    start: Rounding
    config: Config
    scores: Scores | None

    def form(self, layer: Layer) -> LinearForm | None:
        """Return the layer as a matrix product, if it is one."""
        return linear_form(self.nodes[layer.node], self.view)

    def solve(
        self,
        layers: Sequence[Layer],
        reached: Reached,
        place: int,
        *,
        rounds: bool,
    ) -> dict[str, Solution]:
        """Solve layers with the same inputs, as one problem; empty if no sample gives them finite inputs.

        Parameters
        ----------
        layers : sequence of Layer
            Several only as `read_together` returns them.
        reached : Reached
            Their input in both networks.
        place : int
            Index of the first layer in the plan.
        rounds : bool
            False if only the mean error is wanted.

        Returns
        -------
        dict of str to Solution
            By node.
        """
        first, config, view = layers[0], self.config, self.view
        form = self.form(first)
        assert form is not None
        weights: list[Array] = [np.asarray(view.constant(x.weight), np.float32) for x in layers]
        rows: Array = np.concatenate([form.weight_rows(w) for w in weights], axis=1)
        importance = _importance(
            self.scores, first, reached.batches, [form.positions(x.shape) for x in reached.exact]
        )
        # Work in units in which float32 holds the squares.
        units = quant_math.layer_units((*reached.exact, *reached.quantized), rows)
        nonlinearity = _nonlinearity(view, first, form, self.start, config, units[0] * units[1])
        # Without a bias, the weights alone must reproduce the mean.
        moments = Moments(np.asarray(rows / units[1], np.float32), first.bias is not None, nonlinearity)
        wanted = wanted_rows(rows.shape[2], first.weight_spec.bits)
        rng = np.random.default_rng((config.seed, place))
        inputs = _over(reached.exact, units[0]), _over(reached.quantized, units[0])
        sampled_moments(form, moments, inputs, wanted, rng, importance)
        if moments.is_empty:
            return {}
        if len(layers) > 1:
            block = first.weight_spec.granularity
            own_axis = PerBlock(2, block.size) if isinstance(block, PerBlock) else PerAxis(1)
            spec = replace(first.weight_spec, granularity=own_axis)
            problem = self._problem(Rows(), rows, units, spec, moments, None)
            values, grid, target = problem.solve(np.concatenate([self._least(x, apart=True) for x in layers]))
            return _parted(layers, weights, form, moments, units, (values, grid, target))
        own: WeightForm = OutputsApart(form, moments.apart) if moments.apart > 1 else form
        outputs = self.scores.outputs.get(first.output) if self.scores is not None else None
        problem = self._problem(own, weights[0], units, first.weight_spec, moments, outputs)
        rounded = problem.solve(self._least(first)) if rounds else None
        return {first.node: Solution(own, moments, units, slice(None), rounded)}

    def _problem(
        self,
        form: WeightForm,
        weight: Array,
        units: tuple[np.float32, np.float32],
        spec: QuantSpec,
        moments: Moments,
        outputs: NDArray[np.float64] | None,
    ) -> LayerProblem:
        config = self.config
        damping = Damping(config.correction_damping, config.rounding_damping)
        return LayerProblem(form, weight, units, spec, moments, outputs, damping, config.descent_passes)

    def _least(self, layer: Layer, *, apart: bool = False) -> Array:
        """Return the smallest scales that the bias allows: one, or one for each output if ``apart``."""
        least: Array = np.zeros(1, np.float32)
        if layer.bias is not None:
            least = BiasGrid.of(layer, self.plan, self.start).least_weight_scale(
                self.start.biases[layer.bias]
            )
        form = self.form(layer)
        assert form is not None
        outputs = row_shape(form, self.view.constant_shape(layer.weight))[1]
        return np.broadcast_to(least, (outputs,)) if apart else least


def _parted(
    layers: Sequence[Layer],
    weights: Sequence[Array],
    form: LinearForm,
    moments: Moments,
    units: tuple[np.float32, np.float32],
    rounded: tuple[Values, Grid, Array],
) -> dict[str, Solution]:
    """Return the solution of each layer of a joint problem."""
    values, grid, target = rounded
    zero = np.broadcast_to(grid.zero_point, grid.scale.shape)
    found, begin = {}, 0
    for layer, weight in zip(layers, weights, strict=True):
        part = slice(begin, begin + form.weight_rows(weight).shape[1])
        scale, points = grid.scale[part], zero[part]
        if isinstance(grid.granularity, PerBlock):
            scale, points = (form.weight_from_rows(v[:, part]) for v in (grid.scale, zero))
        own = (
            form.weight_from_rows(values[:, part]),
            layer.weight_spec.grid(scale, points),
            form.weight_from_rows(target[:, part]),
        )
        found[layer.node] = Solution(form, moments, units, part, own)
        begin = part.stop
    return found


def read_together(
    solver: Solver, inputs: Mapping[str, str], skipped: Mapping[str, str]
) -> dict[str, tuple[Layer, ...]]:
    """Return the layers that are solved together, by the node of the first of them.

    They read one tensor, in the same way and with as many terms, so their inputs have the same moments.
    Layers whose positions, outputs or activation functions make moments of their own are left out.

    Parameters
    ----------
    solver : Solver
    inputs : mapping of str to str
        The tensor that each node of the quantized network reads.
    skipped : mapping of str to str
        Nodes that are not solved.
    """
    view = solver.view
    groups: dict[object, list[Layer]] = {}
    for layer in solver.plan.layers:
        form = solver.form(layer)
        if form is None or layer.node in skipped or solver.scores is not None:
            continue
        shape = view.constant_shape(layer.weight)
        count, outputs, _ = row_shape(form, shape)
        owners = scale_places(form, shape, layer.weight_spec.axis)
        in_blocks = isinstance(layer.weight_spec.granularity, PerBlock)
        apart = count == 1 and (in_blocks or np.array_equal(owners[0], np.arange(outputs)))
        if apart and activation_of(view, layer, form, solver.config) is None:
            biased = layer.bias is not None
            key = layer.input, inputs[layer.node], form, biased, layer.static, layer.weight_spec
            groups.setdefault(key, []).append(layer)
    return {group[0].node: tuple(group) for group in groups.values() if len(group) > 1}


def wanted_rows(terms: int, bits: int) -> int:
    """Return how many rows of inputs a layer's moments are taken from, at most."""
    per_term, least, most = _ROWS_FEW_BITS if bits <= quant_math.FEW_BITS else _ROWS_MANY_BITS
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
        found.append(
            None
            if own is None
            else (1 - _HESSIAN_SHARE) + np.float32(_HESSIAN_SHARE) * own.astype(np.float32)
        )
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


def activation_of(view: GraphView, layer: Layer, form: LinearForm, config: Config) -> _Activation | None:
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
    if not axis or layer.weight_spec.bits > quant_math.FEW_BITS or groups * outputs * terms**2 > most:
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
    activation = activation_of(view, layer, form, config)
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
