"""Step 7: network-wise optimization (paper section 4): soft rounding, biases, weight and activation scales at once.

The loss is that of the layers, weighed by sample-layer attention, and that of the network's outputs, half of it at the start.
Attention is of first order: where errors add up it misleads. The outputs alone want to be smaller than they should be.
The result is the best of the hard-rounded candidates on samples that the optimization has not seen, the start among
them. A candidate is the moving average of the parameters: single steps wander about where they go. It must beat the start
sample by sample, by more than chance would, and not buy that with larger errors of the outputs.
What has least squared errors is smaller than it should be, rare strong responses most of all: in the end the last layers get
back the slope that they have in the float network, if the result then still beats the start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from scipy import stats

from eptq_onnx.config import Attention, Config, Optimizer, RoundingVariable
from eptq_onnx.data.samples import Samples
from eptq_onnx.engines.base import ACTIVATION_SCALES, ATTENTION, ERRORS, FLOAT_SHARE, LOSS, TEACHER, GradientSession, TrainingGraph
from eptq_onnx.errors import GradientError
from eptq_onnx.execute.blocks import tensor_bytes
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics import compensation, quant_math
from eptq_onnx.numerics.optimizers import Adam, MovingAverage, RAdam
from eptq_onnx.numerics.rounding import RoundedWeight, SoftWeight, StraightThroughWeight
from eptq_onnx.numerics.types import Array, Feeds
from eptq_onnx.parallel import ordered_map, worker_count
from eptq_onnx.records import Calibration, OptimizationTrace, Plan, Rounding, Scores
from eptq_onnx.runtime import Session
from eptq_onnx.training import augment

FLOAT_PASSES = 9.0
"""What a step costs, in float passes over its samples; checks included."""
_CHECKPOINTS = 10
_RISE = 0.1
"""Share of the steps in which the learning rates rise to their full size."""
_MEMORY = 0.05
"""Share of the steps that a candidate is the average of: the single steps wander about where they go."""
_VARIATIONS = 3
"""Of each held-out sample, that candidates are judged on beside itself."""
_BYTES_A_WEIGHT = 40
"""Of a weight element: its value, target and float twin, what the optimizer keeps, its average, its rounded form and its gradients."""
_BYTES_A_CONSTANT = 9
"""Of an element of a table: its value, its integer, and what that stands for."""
_COPIES_OF_TENSORS = 3
"""Of each tensor while a batch is worked on: in the float network, in the quantized one, and its gradient."""
_MOST_FACTOR = 1e30
"""Of errors in the loss."""
_LEAST_SAMPLES = 5
"""With fewer pairs the signed-rank test never gets below one in twenty."""


_KINDS: dict[RoundingVariable, type[SoftWeight] | type[StraightThroughWeight]] = {
    RoundingVariable.SOFT: SoftWeight,
    RoundingVariable.STRAIGHT_THROUGH: StraightThroughWeight,
}


def needed_bytes(model: ModelProto, plan: Plan, samples: Samples) -> int:
    """Memory that `optimize` takes, about.

    Parameters
    ----------
    model : ModelProto
        The normalized float model.
    plan : Plan
    samples : Samples
    """
    view = GraphView(model)
    weights = sum(math.prod(view.constant_shape(name)) for name in plan.weight_specs)
    constants = sum(math.prod(view.constant_shape(q.name)) for q in plan.activations if q.constant)
    tensors = tensor_bytes(specialize(model, samples.two_batches(samples.micro_batch())))
    return _BYTES_A_WEIGHT * weights + _BYTES_A_CONSTANT * constants + _COPIES_OF_TENSORS * tensors * worker_count()


def optimize(
    plan: Plan,
    start: Rounding,
    graph: TrainingGraph,
    samples: Samples,
    indices: NDArray[np.int64],
    held: NDArray[np.int64],
    calibration: Calibration,
    scores: Scores | None,
    config: Config,
    progress: Callable[[int, int, float], None],
) -> tuple[Rounding, OptimizationTrace]:
    """Learn the rounding of the whole network.

    Parameters
    ----------
    plan : Plan
    start : Rounding
    graph : TrainingGraph
    samples : Samples
    indices : ndarray of shape (n_samples,)
        The scored samples: rows of the tables of ``scores.channels``.
    held : ndarray of shape (n_held,)
        Places in ``indices`` of the samples to choose by; the others are optimized on, or these too, if there are none.
    calibration : Calibration
    scores : Scores or None
        Without scores, or with ``config.attention`` none, every layer and sample counts the same.
    config : Config
    progress : callable
        Called with steps done, steps in all and the loss.

    Returns
    -------
    Rounding, OptimizationTrace

    Raises
    ------
    GradientError
        If the loss is not a number.
    """
    began = time.perf_counter()
    # What the layers multiply is what a step takes its time for.
    total = config.step_count(sum(start.integers[x.weight].size * n for x, n in zip(plan.layers, graph.positions, strict=True)))
    state = _State(plan, start, graph, calibration, config, total)
    attention = channel_attention(plan, scores, graph.channels, len(indices), config)
    layer_weights = np.maximum.reduceat(attention, np.cumsum([0, *graph.channels[:-1]]), axis=1).mean(axis=0)
    attention = np.hstack([attention, np.tile(part_weights(graph, calibration), (len(indices), 1))])
    seen = np.setdiff1d(np.arange(len(indices)), held)
    seen = seen if len(seen) else held
    evaluation = GradientSession(graph.evaluate, integers=False)
    judge = _Judge(graph, evaluation, _Batches(graph, samples, indices, attention), held, config)
    found = judge(state, start)
    if not np.isfinite(found).all():
        raise GradientError("the errors of layers or outputs are beyond the numbers of float32.")
    balance = Balance.of(found, config.output_share)
    if not balance.fits:
        raise GradientError("the errors of layers or outputs are too small for float32.")
    kept = _Kept(start, balance(found))
    batches = _Batches(graph, samples, indices, attention * balance.columns(graph))
    layer_weights = balance.units[0] * layer_weights
    session = GradientSession(graph.train, integers=False)
    batch = min(max(1, config.batch_size // samples.rows), len(seen))
    rng = np.random.default_rng(config.seed)
    queue: list[int] = []
    losses: list[float] = []
    for step in range(total):
        while len(queue) < batch:
            queue.extend(rng.permutation(seen).tolist())
        chosen, queue = np.array(queue[:batch]), queue[batch:]
        losses.append(state.step(session, batches, chosen, layer_weights, step, rng))
        if not np.isfinite(losses[-1]):
            raise GradientError(f"the loss of step {step + 1} is not a number.")
        progress(step + 1, total, losses[-1])
        if (step + 1) * _CHECKPOINTS // total > step * _CHECKPOINTS // total:
            candidate = state.harden()
            fruitless = kept.offer(step + 1, candidate, balance(judge(state, candidate)))
            # Undecided weights need all the steps, and full ones.
            if config.rounding is not RoundingVariable.SOFT:
                if fruitless:
                    state.slow_down()
                if config.patience and (fruitless >= config.patience or kept.is_settled):
                    break
    if kept.step:
        runs = batches.runs(np.arange(len(indices)), state.hard_parameters(kept.rounding), evaluation)
        restored = _restored(plan, graph, evaluation, runs, len(indices), kept.rounding)
        kept.amend(restored, balance(judge(state, restored)))
    trace = OptimizationTrace(
        steps=len(losses),
        losses=tuple(losses),
        checkpoints=tuple(kept.checkpoints.items()),
        best_step=kept.step,
        flipped=_flipped(start, kept.rounding),
        seconds=time.perf_counter() - began,
        reason=kept.reason(len(losses), total),
    )
    return kept.rounding, trace


class _Kept:
    """The best candidate so far; at first that is the start.

    Parameters
    ----------
    start : Rounding
    errors : ndarray of shape (2, n_samples)
        Of the start; see `Balance`.
    """

    def __init__(self, start: Rounding, errors: Array) -> None:
        self.rounding, self.step = start, 0
        self.checkpoints = {0: float(errors[0].sum())}
        self._outputs = [float(errors[1].mean())]
        self._start = errors

    def offer(self, step: int, candidate: Rounding, errors: Array) -> int:
        """Take the candidate if it may replace the start and is the best of these; returns how many checks ago the lowest loss was."""
        self.checkpoints[step] = float(errors[0].sum())
        self._outputs.append(float(errors[1].mean()))
        if self.checkpoints[step] < self.checkpoints[self.step] and is_accepted(errors, self._start):
            self.rounding, self.step = candidate, step
        losses = list(self.checkpoints.values())
        return len(losses) - 1 - losses.index(min(losses))

    @property
    def is_settled(self) -> bool:
        """True if the start will be kept: one of the errors that a candidate must lower was lower in no check, and does not fall."""
        (loss, *losses), (output, *outputs) = self.checkpoints.values(), self._outputs
        if self.step or len(losses) < 2:
            return False
        # Rising from the first check to the last, or level.
        rises = [values[-1] >= min(values[:-1]) for values in (losses, outputs)]
        return (min(losses) >= loss and rises[0]) or (min(outputs) > output and rises[1])

    def reason(self, steps: int, total: int) -> str:
        """Why this rounding was kept, after so many steps, as a sentence."""
        (loss, *losses), (output, *outputs) = self.checkpoints.values(), self._outputs
        ran = f"{steps} of {total} steps" + ("; stopped early" if steps < total else "")
        if self.step:
            return (
                f"step {self.step} was kept: it lowered the error on held-out samples ({_change(self.checkpoints[self.step], loss)}; {ran})"
            )
        if not losses:
            return "the start was kept: there was no check"
        if min(losses) >= loss:
            return f"the start was kept: no step lowered the error on held-out samples (best {_change(min(losses), loss)} in {ran})"
        if min(outputs) > output:
            best = _change(min(outputs), output)
            return f"the start was kept: no step lowered the error of the outputs on held-out samples (best {best} in {ran})"
        best = _change(min(losses), loss)
        return (
            "the start was kept: no step lowered the error on held-out samples by more than chance without raising that of the outputs "
            f"(best {best} in {ran})"
        )

    def amend(self, rounding: Rounding, errors: Array) -> None:
        """Take another form of what is kept, if that, too, may replace the start."""
        if is_accepted(errors, self._start):
            self.rounding = rounding


def _change(value: float, former: float) -> str:
    return f"{value / former - 1:+.1%}".replace("%", " %") if former else f"from 0 to {value:.3g}"


def is_accepted(errors: Array, others: Array) -> bool:
    """True if a candidate may replace the start: better in all, and no worse at the outputs.

    Parameters
    ----------
    errors, others : ndarray of shape (2, n_samples)
        Of the candidate and of the start; see `Balance`.
    """
    return bool(errors[1].mean() <= others[1].mean()) and is_better(errors[0], others[0])


def is_better(errors: Array, others: Array) -> bool:
    """True if the errors of the same samples are lower on average, and not by chance.

    Chance is what Wilcoxon's signed-rank test gives less than one in twenty: a few loud samples do not decide. Too few
    samples cannot tell, and their average does.
    """
    gain = np.asarray(others - errors, np.float64)
    if gain.mean() <= 0:
        return False
    return len(gain) < _LEAST_SAMPLES or float(stats.wilcoxon(gain, alternative="greater").pvalue) < 0.05


def layer_attention(plan: Plan, scores: Scores | None, count: int) -> Array:
    """Sample-layer attention w[l, n] (paper section 3.2) divided by its largest layer mean; shape (n_layers, n_samples).

    Layers that no gradient reaches count like the average layer; without scores all count the same.
    """
    if scores is None or not any(layer.output in scores.channels for layer in plan.layers):
        return np.ones((len(plan.layers), count), np.float32)
    rows: dict[str, Array] = {x.output: scores.channels[x.output].max(axis=1) for x in plan.layers if x.output in scores.channels}
    mean: Array = np.mean(list(rows.values()), axis=0)
    table = np.stack([rows.get(layer.output, mean) for layer in plan.layers])
    table = table / quant_math.unit(table)
    largest = float(table.mean(axis=1).max())
    return (table / np.float32(largest)).astype(np.float32) if largest > 0 else np.ones_like(table)


def channel_attention(plan: Plan, scores: Scores | None, channels: Sequence[int], count: int, config: Config) -> Array:
    """The weight of every sample and channel in the loss; shape (n_samples, sum of channels)."""
    layers = layer_attention(plan, None if config.attention is Attention.NONE else scores, count)
    columns = []
    for layer, row, n in zip(plan.layers, layers, channels, strict=True):
        share = np.ones((count, n), np.float32)
        if scores is not None and config.attention is Attention.CHANNEL and layer.output in scores.channels:
            table = scores.channels[layer.output]
            peak = table.max(axis=1, keepdims=True)
            share = np.where(peak > 0, table / np.maximum(peak, 1e-30), 1).astype(np.float32)
        columns.append(row[:, None] * share)
    return np.concatenate(columns, axis=1)


@dataclass(frozen=True)
class Balance:
    """How the errors of layers and of outputs make up the loss.

    Parameters
    ----------
    units : ndarray of shape (2,)
        With these factors the start's errors, of the layers and of the outputs, make 1 each.
    shares : ndarray of shape (2,)
        Of the loss of the start.
    """

    units: NDArray[np.float64]
    shares: NDArray[np.float64]

    @staticmethod
    def of(errors: Array, output_share: float) -> Balance:
        """The balance for the errors of the start, as `_Judge` gives them; what has none has no share."""
        sums = errors[:2].sum(axis=1, dtype=np.float64)
        some = sums > 0
        shares = some * np.array([1 - output_share, output_share])
        if not shares.any():
            shares = some * 1.0
        return Balance(np.divide(1.0, sums, out=np.zeros(2), where=some), shares / max(shares.sum(), 1e-30))

    @property
    def _factors(self) -> NDArray[np.float64]:
        return self.shares * self.units

    @property
    def fits(self) -> bool:
        """True if float32 holds the factors."""
        return bool((self._factors < _MOST_FACTOR).all())

    def __call__(self, errors: Array) -> Array:
        """Of what `_Judge` gives, each sample's loss, and its outputs' errors as they are; shape (2, n_samples)."""
        return np.stack([self._factors @ errors[:2], errors[2]])

    def columns(self, graph: TrainingGraph) -> Array:
        """Factor of each column of the errors that the graph gives."""
        return np.repeat(self._factors, [sum(graph.channels), len(graph.outputs)]).astype(np.float32)


def part_weights(graph: TrainingGraph, calibration: Calibration) -> Array:
    """What the squared errors of each part of the outputs count: it is seen in units of its spread; shape (n_parts,)."""
    return np.array([1 / calibration.variance[name] for name in graph.outputs], np.float32)


def _restored(plan: Plan, graph: TrainingGraph, session: Session, runs: Iterable[Feeds], count: int, rounding: Rounding) -> Rounding:
    """The rounding with the slopes and means of the float network in the last layers, by their weights' scales and biases.

    The runs are those of ``rounding`` for ``count`` samples.
    """
    shared = plan.shared_weights
    layers = [x for x, last in zip(plan.layers, graph.last, strict=True) if last and x.weight not in shared]
    if not layers:
        return rounding

    def compared(feeds: Feeds) -> list[compensation.Comparison]:
        values = session.run(feeds, [side + x.output for x in layers for side in (TEACHER, "")])
        pairs = (
            (np.moveaxis(v, x.output_axis, -1) for v in _both_finite(*(values[side + x.output] for side in (TEACHER, "")))) for x in layers
        )
        return [compensation.Comparison.of(*pair) for pair in pairs]

    weights, biases = dict(rounding.weights), dict(rounding.biases)
    for layer, parts in zip(layers, zip(*ordered_map(compared, runs), strict=True), strict=True):
        # Without the fillers of the last run.
        seen = compensation.Comparison.joined(parts, count / (len(parts) * graph.micro_batch))
        params, (exact, rough) = weights[layer.weight], seen.means
        # Where all channels, or those of several groups, have one scale, they have one gain.
        gain = seen.gains if params.scale.shape == exact.shape else seen.gains.mean()
        weights[layer.weight] = replace(params, scale=np.asarray(params.scale * gain, np.float32))
        if layer.bias is not None:
            biases[layer.bias] = np.asarray(gain * biases[layer.bias] + exact - gain * rough, np.float32)
    return replace(rounding, weights=weights, biases=biases)


def _both_finite(exact: Array, rough: Array) -> tuple[Array, Array]:
    """Both, where both are numbers; elsewhere 0 in both, so that they agree."""
    known = np.isfinite(exact) & np.isfinite(rough)
    return (exact, rough) if known.all() else (np.where(known, exact, 0), np.where(known, rough, 0))


def _flipped(start: Rounding, end: Rounding) -> float:
    size = sum(i.size for i in start.integers.values())
    return sum(int((start.integers[n] != end.integers[n]).sum()) for n in start.integers) / max(size, 1)


class _State:
    """Everything that is learned, and how it is updated."""

    def __init__(self, plan: Plan, start: Rounding, graph: TrainingGraph, calibration: Calibration, config: Config, total: int) -> None:
        self._plan, self._start, self._graph, self._config, self._total = plan, start, graph, config, total
        learnable = [n for n in plan.weight_specs if n in graph.gradients]
        kind = _KINDS[config.rounding]
        self.weights: dict[str, RoundedWeight] = {
            n: kind(
                quant_math.continuous(start.targets[n], start.integers[n], start.weights[n], plan.weight_specs[n]),
                start.weights[n],
                plan.weight_specs[n],
            )
            for n in learnable
        }
        self._quantizers = plan.quantizer_of
        self._frozen = {
            n: quant_math.dequantize(start.integers[n], start.weights[n], spec)
            for n, spec in plan.weight_specs.items()
            if n not in self.weights
        }
        self._bias_unit = {
            x.bias: np.float32(np.sqrt(calibration.power[x.output]) or 1.0)
            for x in plan.layers
            if x.bias is not None and x.bias in graph.gradients
        }
        self._bias_shift: dict[str, Array] = {n: np.zeros_like(start.biases[n]) for n in self._bias_unit}
        self._log_scales: Array = np.zeros(len(graph.quantizers), np.float32)
        self._pace = 1.0
        self._first_scales = np.array([float(start.activations[q].scale) for q in graph.quantizers], np.float32)
        self._layers_of = {n: [k for k, x in enumerate(plan.layers) if x.weight == n] for n in self.weights}
        rounding = RAdam if config.optimizer is Optimizer.RADAM else Adam
        self._rounding = rounding({n: w.variable for n, w in self.weights.items()})
        self._factors = Adam({n: w.gamma for n, w in self.weights.items()})
        self._biases = Adam(self._bias_shift)
        self._scales = Adam({ACTIVATION_SCALES: self._log_scales})
        self._means = MovingAverage(
            {
                **{("variable", n): w.variable for n, w in self.weights.items()},
                **{("gamma", n): w.gamma for n, w in self.weights.items()},
                **{("bias", n): shift for n, shift in self._bias_shift.items()},
                ("scales", ACTIVATION_SCALES): self._log_scales,
            },
            _MEMORY * total,
        )

    def step(
        self,
        session: Session,
        batches: _Batches,
        chosen: NDArray[np.int64],
        layer_weights: Array,
        step: int,
        rng: np.random.Generator,
    ) -> float:
        """One update from the samples at places ``chosen``; returns the loss."""
        steps = {n: p.scale for n, p in self._start.weights.items()} | {n: w.scale * w.gamma for n, w in self.weights.items()}
        weights = {n: w.forward() for n, w in self.weights.items()}
        feeds = self._parameters(weights, steps, self._biases_of(self._bias_shift), self._scales_of(self._log_scales))
        feeds[FLOAT_SHARE] = np.array([max(0.0, 1 - (step + 1) / self._total)], np.float32)
        gradients: dict[str, Array] = {}
        loss = 0.0
        wanted = [LOSS, *self._graph.gradients.values()]
        for values in ordered_map(
            lambda run: session.run(run, wanted), batches.runs(chosen, feeds, session, rng if self._config.augment else None)
        ):
            loss += float(values[LOSS])
            for name, output in self._graph.gradients.items():
                value = values[output]
                gradients[name] = gradients[name] + value if name in gradients else value
        for name, value in gradients.items():
            if not np.isfinite(value).all():
                raise GradientError(f"the gradient of {name} in step {step + 1} is not a number.")
        return loss + self._update(gradients, layer_weights, step)

    def _update(self, gradients: dict[str, Array], layer_weights: Array, step: int) -> float:
        config, total = self._config, self._total
        warm = config.warmup * total
        strength = config.rounding_strength if step >= warm else 0.0
        exponent = 20 + (2 - 20) * min(1.0, max(0.0, (step - warm) / max(1.0, total - warm)))
        penalty, alphas, gammas = 0.0, {}, {}
        for name, weight in self.weights.items():
            factor = strength * float(sum(layer_weights[k] for k in self._layers_of[name]))
            alphas[name], gammas[name] = weight.backward(gradients[name], factor, exponent)
            if factor:
                penalty += factor * weight.penalty(exponent)
        # Adam's first steps are as long as the others and know the least.
        cosine = 0.5 * (1 + np.cos(np.pi * step / total)) * min(1.0, (step + 1) / (_RISE * total))
        self._rounding.step(alphas, config.rounding_rate * self._pace * cosine)
        self._factors.step(gammas, config.scale_lr * cosine)
        self._biases.step({n: gradients[n] * unit for n, unit in self._bias_unit.items()}, config.bias_lr * cosine)
        if ACTIVATION_SCALES in gradients:
            self._scales.step(
                {ACTIVATION_SCALES: gradients[ACTIVATION_SCALES] * self._scales_of(self._log_scales)}, config.activation_scale_lr * cosine
            )
        self._means.update()
        return penalty

    def slow_down(self) -> None:
        """Halve the steps of the rounding variables: weights that flip to and fro are noise to all the others."""
        self._pace /= 2

    def harden(self) -> Rounding:
        """Where the parameters are going, with every weight decided."""
        means = self._means.values
        integers, params = dict(self._start.integers), dict(self._start.weights)
        for name, weight in self.weights.items():
            settled = copy(weight)
            settled.variable, settled.gamma = means["variable", name], means["gamma", name]
            integers[name], params[name] = settled.harden()
        activations = dict(self._start.activations)
        bounds = {q.name: q for q in self._plan.activations}
        for name, scale in zip(self._graph.quantizers, self._scales_of(means["scales", ACTIVATION_SCALES]), strict=True):
            changed = replace(activations[name], scale=np.asarray(scale, np.float32))
            activations[name] = quant_math.inside_bounds(changed, bounds[name].spec, bounds[name].bounds)
        biases = self._biases_of({n: means["bias", n] for n in self._bias_shift})
        return Rounding(integers, params, activations, {**self._start.biases, **biases}, self._start.targets)

    def hard_parameters(self, rounding: Rounding) -> Feeds:
        """Feeds of the evaluation graph for a hard-rounded candidate."""
        weights = {n: quant_math.dequantize(rounding.integers[n], rounding.weights[n], s) for n, s in self._plan.weight_specs.items()}
        scales = np.array([float(rounding.activations[q].scale) for q in self._graph.quantizers], np.float32)
        return self._parameters(weights, {n: p.scale for n, p in rounding.weights.items()}, dict(rounding.biases), scales)

    def _parameters(self, weights: dict[str, Array], steps: dict[str, Array], biases: dict[str, Array], scales: Array) -> Feeds:
        """Feeds for weights with integer steps of the given sizes; biases are rounded as they will be written."""
        feeds: Feeds = {**self._frozen, **weights, **self._start.biases, **biases}
        if self._plan.integer_bias:
            activations = {n: p.scale for n, p in self._start.activations.items()}
            activations.update(zip(self._graph.quantizers, scales, strict=True))
            for layer in self._plan.layers:
                if layer.bias is not None:
                    grid = activations[self._quantizers[layer.input].name], steps[layer.weight]
                    exact = np.asarray(feeds[layer.bias], np.float32)
                    feeds[layer.bias] = quant_math.round_bias(exact, *grid)
        if self._graph.quantizers:
            feeds[ACTIVATION_SCALES] = scales
        return feeds

    def _biases_of(self, shifts: dict[str, Array]) -> dict[str, Array]:
        return {n: self._start.biases[n] + shift * self._bias_unit[n] for n, shift in shifts.items()}

    def _scales_of(self, logarithms: Array) -> Array:
        result: Array = self._first_scales * np.exp(logarithms)
        return result


class _Batches:
    """Feeds of the training and evaluation graphs for chosen samples.

    Parameters
    ----------
    graph : TrainingGraph
    samples : Samples
    indices : ndarray of shape (n_samples,)
    attention : ndarray of shape (n_samples, n_columns)
        What the mean squares of each column count.
    """

    def __init__(self, graph: TrainingGraph, samples: Samples, indices: NDArray[np.int64], attention: Array) -> None:
        self._graph, self._samples, self._indices, self._attention = graph, samples, indices, attention
        self._positions = np.array([*np.repeat(graph.positions, graph.channels), *graph.outputs.values()], np.float32)

    def runs(
        self, places: NDArray[np.int64], parameters: Feeds, session: Session, rng: np.random.Generator | None = None
    ) -> Iterator[Feeds]:
        """What to feed the session with, run by run, for the samples at ``places``; fillers of the last run weigh nothing.

        With ``rng`` the samples are varied at random, and mixed with each other.
        """
        size = self._graph.micro_batch
        padded = np.concatenate([places, np.full(-len(places) % size, -1, np.int64)])
        for part in padded.reshape(-1, size):
            inputs, attention = self._samples.take(self._indices[part]), self._attention[part]
            if rng is not None:
                inputs, attention = self._varied(inputs, attention, places, rng)
            weight = attention * (part >= 0)[:, None] / (self._positions * np.float32(len(places)))
            feeds = {**parameters, **inputs, ATTENTION: weight.astype(np.float32)}
            yield session.taken(feeds)

    def _varied(self, inputs: Feeds, attention: Array, places: NDArray[np.int64], rng: np.random.Generator) -> tuple[Feeds, Array]:
        axes = self._graph.input_axes
        inputs = augment.moved(inputs, axes, rng)
        if not augment.can_mix(inputs, len(attention)):
            return inputs, attention
        others = rng.choice(places, len(attention))
        share = rng.uniform(size=len(attention)).astype(np.float32)
        inputs = augment.mixed(inputs, augment.moved(self._samples.take(self._indices[others]), axes, rng), share)
        return inputs, share[:, None] * attention + (1 - share[:, None]) * self._attention[others]


class _Judge:
    """The weighted errors of hard-rounded candidates, one a held-out sample; shape (3, n_samples).

    First those of all layers, then those of the outputs: where the optimization sees varied samples, so does the judge,
    always the same, for a few held-out samples alone tell little apart. Last those of the outputs on the samples as they
    are: what is gained must reach them, and not on varied samples only.
    """

    def __init__(self, graph: TrainingGraph, session: Session, batches: _Batches, held: NDArray[np.int64], config: Config) -> None:
        self._session, self._batches, self._held = session, batches, held
        self._variations, self._seed = _VARIATIONS if config.augment else 0, config.seed
        self._layers = sum(graph.channels)

    def __call__(self, state: _State, candidate: Rounding) -> Array:
        parameters, rng = state.hard_parameters(candidate), np.random.default_rng(self._seed)
        views = [None] + [rng] * self._variations
        runs = (run for view in views for run in self._batches.runs(self._held, parameters, self._session, view))
        rows = np.concatenate(list(ordered_map(self._errors, runs)), axis=1).reshape(2, len(views), -1)[:, :, : len(self._held)]
        return np.stack([*rows.mean(axis=1), rows[1, 0]])

    def _errors(self, feeds: Feeds) -> Array:
        # Errors beyond float32 are infinite, and no candidate's.
        with np.errstate(over="ignore", invalid="ignore"):
            errors = self._session.run(feeds, [ERRORS])[ERRORS] * feeds[ATTENTION]
            return np.stack([part.sum(axis=1) for part in np.split(errors, [self._layers], axis=1)])
