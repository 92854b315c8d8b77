"""Scale the channels of quantized tensors to make better use of the range that they share.

Integer kernels take one scale for all channels of an activation, so the widest channel determines the
rounding error of all of them. Where the layers around a tensor can absorb factors
(`eptq_onnx.graph.channels`), its channels are scaled: the float model computes the same, but the rounding
error of channel c is that of the common range of all ``f x``, divided by ``f[c]`` (cross-layer equalization,
Nagel et al. 2019). The weights that read the tensor pay for it, because each of their rows has a single grid
(the trade-off of SmoothQuant, Xiao et al. 2023). To first order the errors of the network's outputs are

    sum_t sum_c G[t, c] (step_t² / (12 f[c]²) + D[t, c](R_t / f[c]))  +  sum_l S_l² sum_c E[l, c] f[c]² / 12,

with the Hessian scores G of the quantized tensors t; the quantization step of a tensor, given by its range R;
the squares D of the values clipped beyond that range; the mean squares E of the inputs of the layers l; and
the mean step S of a layer's rows, which follows their largest elements ``W / f``. L-BFGS optimizes all
factors and ranges of the network together; calibration then chooses the ranges anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from scipy.optimize import minimize

from eptq_onnx.config import Config
from eptq_onnx.data.samples import Samples, spread
from eptq_onnx.execute.blocks import blocks_of, observe
from eptq_onnx.graph import edit
from eptq_onnx.graph.channels import Channels, Factors, Slots
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics import quant_math
from eptq_onnx.numerics.linear import LinearForm
from eptq_onnx.numerics.magnitudes import ChannelMagnitudes, Side
from eptq_onnx.numerics.spec import QuantSpec
from eptq_onnx.numerics.types import Array, Float64
from eptq_onnx.ops import channels_of, linear_form
from eptq_onnx.records import Plan, Scores

SAMPLES = 64
"""Samples to look at, at most."""
A_MAGNITUDE = 4.0
"""Cost of a value in a histogram of magnitudes, relative to one in a histogram of values."""
_ROWS = 4.0
"""Exponent of the norm that stands for the largest elements of rows, which lie in different channels."""
_BYTES_A_CHANNEL = 16_000
"""Bytes per channel of a scaled tensor: its histogram and what is derived from it."""
_MOST = 64.0
"""Largest factor; its inverse is the smallest."""
_RIDGE = 1e-3
"""Regularization that keeps factors at 1 where they hardly matter."""
_WORTH = 0.98
"""Ratio of predicted errors after and before, above which nothing is scaled."""


@dataclass(frozen=True)
class _Group:
    """The tensors of one quantizer, which share its range."""

    spec: QuantSpec
    tensors: dict[str, ChannelMagnitudes]


class _Activations:
    """Error of the activations of one quantizer: its part of the first sum.

    Parameters
    ----------
    sets : ndarray of int, shape (n_channels,)
    sides : sequence of Side
        Magnitudes of all its tensors, below and above 0; a single one if the range is symmetric.
    importance : ndarray of shape (n_channels,)
        G: error of the outputs for a squared error of 1 in the channel, per sample.
    levels : int
        Steps in the range, or in one of its sides if it is symmetric.
    """

    def __init__(self, sets: Slots, sides: Sequence[Side], importance: Float64, levels: int) -> None:
        self.sets, self._importance, self._levels = sets, importance, levels
        self._sides = [side for side in sides if side.largest.any()]

    @property
    def widest(self) -> list[float]:
        """Return the logarithms of the ends of the range that clips nothing with all factors at 1."""
        return [float(np.log(side.largest.max())) for side in self._sides]

    def error(self, logs: Float64, ends: Float64) -> tuple[float, Float64, Float64]:
        """Return the error and its gradients for the logarithms of the factors and of the range's ends."""
        reach = np.exp(ends)
        rounding = self._importance * (reach.sum() / self._levels) ** 2 / 12 * np.exp(-2 * logs)
        total, slope = float(rounding.sum()), -2 * rounding
        ends_slope = 2 * total * reach / max(float(reach.sum()), 1e-30)
        for k, side in enumerate(self._sides):
            cut, pull = side.beyond(np.exp(ends[k] - logs))
            total += float(self._importance @ cut)
            slope -= self._importance * pull
            ends_slope[k] += float(self._importance @ pull)
        return total, slope, ends_slope


class _Weights:
    """Error of one group of a layer's weight: its part of the second sum, ``S² sum_c E[c] f[c]²``.

    Parameters
    ----------
    sets : ndarray of int, shape (n_channels,)
    rows : ndarray of shape (n_outputs, n_channels, taps)
        The weight.
    energy : ndarray of shape (n_channels,)
        Mean square of each input channel.
    importance : ndarray of shape (n_outputs,)
        Error of the network's outputs for a squared error of 1 in each output, per sample.
    levels : int
    """

    def __init__(
        self, sets: Slots, rows: NDArray[np.floating], energy: Float64, importance: Float64, levels: int
    ) -> None:
        self.sets = sets
        most, least = np.maximum(rows.max(axis=2), 0), np.minimum(rows.min(axis=2), 0)
        unit = quant_math.unit(rows)
        columns = np.sqrt(importance @ np.square(np.maximum(most, -least) / unit)) * float(unit)
        self._columns = np.log(columns + 1e-30)
        steps = (most.max(axis=1) - least.min(axis=1)) / levels
        share = (
            float(importance @ np.square(steps / unit))
            * float(unit) ** 2
            / max(_norm(self._columns, _ROWS)[0], 1e-30) ** 2
        )
        self._energy = share * rows.shape[2] * energy / 12

    def error(self, logs: Float64) -> tuple[float, Float64]:
        """Return the error and its gradient for the logarithms of the channel factors."""
        step, shares = _norm(self._columns - logs, _ROWS)
        parts = step**2 * self._energy * np.exp(2 * logs)
        total = float(parts.sum())
        return total, 2 * parts - 2 * total * shares


def _norm(logs: Float64, power: float) -> tuple[float, Float64]:
    """Return the p-norm of positive numbers and the gradient of its logarithm, both from their logarithms."""
    most = float(logs.max())
    parts = np.exp(power * (logs - most))
    total = float(parts.sum())
    return float(np.exp(most)) * total ** (1 / power), parts / total


def needed_bytes(model: ModelProto, plan: Plan) -> int:
    """Return the approximate memory that `equalize` needs, in bytes.

    Parameters
    ----------
    model : ModelProto
        The whole normalized model.
    plan : Plan
    """
    channels = channels_of(GraphView(model))
    groups = _groups(plan, channels, channels.classes()[1])
    return _BYTES_A_CHANNEL * sum(len(t.sets) for g in groups for t in g.tensors.values())


def equalize(
    model: ModelProto,
    running: ModelProto,
    plan: Plan,
    samples: Samples,
    scores: Scores | None,
    config: Config,
    progress: Callable[[int, int], None],
) -> tuple[ModelProto, Scores | None, dict[str, float], list[str]]:
    """Scale channels, and the constants of the layers around them.

    Parameters
    ----------
    model : ModelProto
        The whole normalized model; it is not changed.
    running : ModelProto
        The part of the model that the samples run.
    plan : Plan
    samples : Samples
        An evenly spread subset is run.
    scores : Scores or None
        If None, errors are taken relative to the power of the tensor they occur in.
    config : Config
    progress : callable
        Called with the number of samples done and the total, both counted once per block.

    Returns
    -------
    ModelProto
        Computes the same outputs, up to float rounding.
    Scores or None
        Scores of the new model.
    dict of str to float
        The quantized tensors whose channels were scaled, with the largest factor, up or down.
    list of str
        Notes.
    """
    if not config.equalize:
        return model, scores, {}, []
    view = GraphView(model)
    channels = channels_of(view)
    count, sets = channels.classes()
    groups = _groups(plan, channels, sets)
    if not groups:
        return model, scores, {}, []
    _observe(running, groups, samples, config, progress)
    boundless = [name for g in groups for name, tensor in g.tensors.items() if not tensor.is_bounded]
    if boundless:
        return (
            model,
            scores,
            {},
            [f"no channels are scaled: values of {boundless[0]} are close to the limit of float32"],
        )
    terms = list(_activations(groups, scores)), list(_weights(view, plan, groups, scores))
    factors = _factors(*terms, count, int(sets[0]))[sets]
    changed = [a for a in channels.absorbers if (factors[a.slots] != 1).any()]
    if not changed:
        return model, scores, {}, []
    ratios = {
        a.constant: a.scaled(np.ones(view.constant_shape(a.constant), np.float32), factors)
        for a in changed if scores is not None and a.constant in scores.weights
    }  # fmt: skip
    result = edit.with_constants(
        model, {a.constant: a.scaled(view.constant(a.constant), factors) for a in changed}
    )
    of_tensor = {
        name: factors[known[0]] for name in view.producer if (known := channels.of(name)) is not None
    }
    scaled = {
        name: float(np.exp(np.abs(np.log(of_tensor[name])).max())) for g in groups for name in g.tensors
    }
    return result, _rescaled(scores, of_tensor, ratios), {name: f for name, f in scaled.items() if f > 1}, []


def _rescaled(scores: Scores | None, factors: dict[str, Factors], ratios: dict[str, Array]) -> Scores | None:
    """Return the scores of the scaled model: the gradient of a scaled value is smaller by the factor."""
    if scores is None:
        return None
    channels = {
        n: (t / factors[n] ** 2).astype(np.float32) if n in factors else t for n, t in scores.channels.items()
    }
    outputs = {
        n: t / np.outer(factors[n], factors[n]) if n in factors else t for n, t in scores.outputs.items()
    }
    weights = {
        n: (h / np.square(ratios[n])).astype(np.float32) if n in ratios else h
        for n, h in scores.weights.items()
    }
    return replace(scores, channels=channels, outputs=outputs, weights=weights)


def _groups(plan: Plan, channels: Channels, sets: Slots) -> list[_Group]:
    """Return the quantizers with channels that may be scaled, with all their tensors."""
    found = []
    for quantizer in plan.activations:
        known = {name: channels.of(name) for name in quantizer.tensors}
        tensors = {name: ChannelMagnitudes(sets[k[0]], k[1]) for name, k in known.items() if k is not None}
        # A tensor without known channels shares the range, and its reach is unknown here.
        if len(tensors) == len(known) and any((t.sets != sets[0]).any() for t in tensors.values()):
            found.append(_Group(quantizer.spec, tensors))
    return found


def _observe(
    model: ModelProto,
    groups: Sequence[_Group],
    samples: Samples,
    config: Config,
    progress: Callable[[int, int], None],
) -> None:
    """Collect the magnitudes of the channels of all tensors."""
    tensors = {name: t for g in groups for name, t in g.tensors.items()}
    size = samples.micro_batch()
    parts = list(samples.batches(spread(samples.count, SAMPLES), size))
    blocks = blocks_of(model, samples.two_batches(size), config.block_bytes)
    done, total = 0, len(blocks) * sum(map(len, parts))
    for k, values in observe(blocks, map(samples.take, parts), list(tensors)):
        for name, value in values.items():
            if value.size:
                tensors[name].add(value, len(parts[k]))
        done += len(parts[k])
        progress(done, total)


def _activations(groups: Iterable[_Group], scores: Scores | None) -> Iterable[_Activations]:
    for group in groups:
        tensors = group.tensors.values()
        sides = [Side.joined([t.side(k) for t in tensors]) for k in (0, 1)]
        levels = group.spec.qmax - group.spec.qmin
        if group.spec.symmetric:
            sides, levels = (
                [Side(np.maximum(sides[0].means, sides[1].means), sides[0].tails + sides[1].tails)],
                levels // 2,
            )
        weights = [
            _importance(name, len(t.sets), t.positions, t.power, scores) for name, t in group.tensors.items()
        ]
        yield _Activations(np.concatenate([t.sets for t in tensors]), sides, np.concatenate(weights), levels)


def _importance(name: str, count: int, positions: float, power: Float64, scores: Scores | None) -> Float64:
    """Return the error of the outputs for a squared error of 1 at all positions of each channel."""
    if scores is None:
        return np.full(count, 1 / max(float(power.sum()), 1e-30))
    table = scores.channels.get(name)
    if table is None or table.shape[1] != count:
        return np.zeros(count)
    unit = quant_math.unit(table)
    return np.asarray((table / unit).mean(axis=0) * positions / scores.output_size, np.float64) * float(unit)


def _weights(
    view: GraphView, plan: Plan, groups: Iterable[_Group], scores: Scores | None
) -> Iterable[_Weights]:
    """Yield the weight errors of the layers whose rows read several channels each."""
    nodes = {n.name: n for n in view.nodes}
    inputs = {name: t for group in groups for name, t in group.tensors.items()}
    for layer in plan.layers:
        form, tensor = linear_form(nodes[layer.node], view), inputs.get(layer.input)
        if form is None or tensor is None:
            continue
        rows = form.weight_rows(view.constant(layer.weight))
        if rows.shape[2] == form.taps:
            continue
        yield from _weights_of(
            rows, form, tensor, layer.output, layer.weight_spec.qmax - layer.weight_spec.qmin, scores
        )


def _weights_of(
    rows: NDArray[np.floating],
    form: LinearForm,
    tensor: ChannelMagnitudes,
    output: str,
    levels: int,
    scores: Scores | None,
) -> Iterable[_Weights]:
    groups, outputs, terms = rows.shape
    sets, energy = tensor.sets.reshape(groups, -1), tensor.power.reshape(groups, -1)
    parted = rows.reshape(groups, outputs, terms // form.taps, form.taps)
    unit = quant_math.unit(parted)
    made = np.einsum("gnct,gc->gn", np.square(parted / unit), energy).reshape(-1) * float(unit) ** 2
    # A layer has about as many positions as its input; if it has fewer, its weight errors count
    # proportionally less.
    importance = _importance(output, groups * outputs, tensor.positions, made, scores).reshape(
        groups, outputs
    )
    for k in range(groups):
        yield _Weights(sets[k], parted[k], energy[k], importance[k], levels)


def _factors(
    activations: Sequence[_Activations], weights: Sequence[_Weights], count: int, fixed: int
) -> Factors:
    """Return the factors of all sets with the least total error; all 1 if that is hardly less."""
    free = np.zeros(count, np.bool_)
    free[np.concatenate([*(t.sets for t in activations), *(w.sets for w in weights)])] = True
    free[fixed] = False
    places = np.flatnonzero(free)
    bounds = np.cumsum([len(places), *(len(t.widest) for t in activations)])

    def total(values: Float64) -> tuple[float, Float64]:
        logs, slope = np.zeros(count), np.zeros(count)
        logs[places] = values[: len(places)]
        slopes, error = np.zeros(len(values)), 0.0
        for term, begin, end in zip(activations, bounds, bounds[1:], strict=False):
            value, own, slopes[begin:end] = term.error(logs[term.sets], values[begin:end])
            error += value
            np.add.at(slope, term.sets, own)
        for layer in weights:
            value, own = layer.error(logs[layer.sets])
            error += value
            np.add.at(slope, layer.sets, own)
        slopes[: len(places)] = slope[places]
        return error, slopes

    def objective(values: Float64) -> tuple[float, Float64]:
        error, slopes = total(values)
        ridge = _RIDGE / max(len(places), 1)
        slopes = slopes / start
        slopes[: len(places)] += 2 * ridge * values[: len(places)]
        return error / start + ridge * float(np.square(values[: len(places)]).sum()), slopes

    limits = [(-np.log(_MOST), np.log(_MOST))] * len(places)
    pinned = [(0.0, 0.0)] * len(places)
    values = np.concatenate([np.zeros(len(places)), *(t.widest for t in activations)])
    anywhere = [(float(v) - 5, float(v) + 5) for v in values[len(places) :]]
    start = total(values)[0]
    if start <= 0 or not len(places):
        return np.ones(count)
    # First optimize the ranges alone, as the baseline to beat.
    values = minimize(
        objective, values, jac=True, method="L-BFGS-B", bounds=[*pinned, *anywhere], options={"maxiter": 100}
    ).x
    start = total(values)[0]
    found = minimize(
        objective, values, jac=True, method="L-BFGS-B", bounds=[*limits, *anywhere], options={"maxiter": 300}
    )
    logs = np.zeros(count)
    logs[places] = found.x[: len(places)]
    return np.exp(logs) if total(found.x)[0] < _WORTH * start else np.ones(count)
