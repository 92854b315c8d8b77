"""Optimize the rounding over the whole network (paper section 4): weights, biases, weight and activation
scales at once.

The loss is that of the layers, weighed by sample-layer attention, and that of the network's outputs, half of
it at the start. Attention is of first order: where errors add up it misleads. The outputs alone want to be
smaller than they should be. The result is the best of the hard-rounded candidates on samples that the
optimization has not seen, the start among them. A candidate is the moving average of the parameters: single
steps wander about where they go. It must beat the start sample by sample, by more than chance would, and not
buy that with larger errors of the outputs. What has least squared errors is smaller than it should be, rare
strong responses most of all: in the end the last layers get back the slope that they have in the float
network, if the result then still beats the start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx.config import Config, RoundingVariable
from eptq_onnx.data.samples import Samples, Selection
from eptq_onnx.engines.base import TEACHER, GradientSession, TrainingGraph
from eptq_onnx.errors import GradientError
from eptq_onnx.execute.blocks import tensor_bytes
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.gains import Comparison
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.numerics.types import Array, Feeds
from eptq_onnx.parallel import ordered_map, worker_count
from eptq_onnx.records import Network, OptimizationTrace, Plan, Rounding
from eptq_onnx.runtime import Session
from eptq_onnx.training.attention import channel_attention, part_weights
from eptq_onnx.training.batches import Batches, HeldOut
from eptq_onnx.training.kept import Balance, Kept
from eptq_onnx.training.learned import Learned
from eptq_onnx.workdir import Partial

FLOAT_PASSES = 9.0
"""What a step costs, in float passes over its samples; checks included."""
_CHECKPOINTS = 10
_BYTES_A_WEIGHT = 40
"""Of a weight element: its value, target and float twin, what the optimizer keeps, its average, its rounded
form and its gradients."""
_BYTES_A_CONSTANT = 9
"""Of an element of a table: its value, its integer, and what that stands for."""
_COPIES_OF_TENSORS = 3
"""Of each tensor while a batch is worked on: in the float network, in the quantized one, and its gradient."""


@dataclass(frozen=True)
class Hooks:
    """What the loop calls while it runs.

    Parameters
    ----------
    progress : callable
        With steps done, steps in all and the loss.
    partial : Partial
        Keeps the state of the loop at its checks.
    """

    progress: Callable[[int, int, float], None]
    partial: Partial = field(default_factory=Partial)


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
    return (
        _BYTES_A_WEIGHT * weights
        + _BYTES_A_CONSTANT * constants
        + _COPIES_OF_TENSORS * tensors * worker_count()
    )


def optimize(
    network: Network,
    start: Rounding,
    graph: TrainingGraph,
    selection: Selection,
    held: NDArray[np.int64],
    config: Config,
    hooks: Hooks,
) -> tuple[Rounding, OptimizationTrace]:
    """Learn the rounding of the whole network.

    Parameters
    ----------
    network : Network
        Without scores, or with ``config.attention`` none, every layer and sample counts the same.
    start : Rounding
    graph : TrainingGraph
    selection : Selection
        The scored samples: rows of the tables of ``scores.channels``.
    held : ndarray of shape (n_held,)
        Places in the selection of the samples to choose by; the others are optimized on, or these too, if
        there are none.
    config : Config
    hooks : Hooks

    Returns
    -------
    Rounding, OptimizationTrace

    Raises
    ------
    GradientError
        If the loss is not a number.
    """
    began = time.perf_counter()
    plan, calibration, samples, indices = (
        network.plan,
        network.calibration,
        selection.samples,
        selection.indices,
    )
    # What the layers multiply is what a step takes its time for.
    total = config.step_count(
        sum(start.integers[x.weight].size * n for x, n in zip(plan.layers, graph.positions, strict=True))
    )
    state = Learned(plan, start, graph, calibration, config, total)
    attention = channel_attention(plan, network.scores, graph.channels, len(indices), config)
    layer_weights = np.maximum.reduceat(attention, np.cumsum([0, *graph.channels[:-1]]), axis=1).mean(axis=0)
    attention = np.hstack([attention, np.tile(part_weights(graph, calibration), (len(indices), 1))])
    seen = np.setdiff1d(np.arange(len(indices)), held)
    seen = seen if len(seen) else held
    evaluation = GradientSession(graph.evaluate, integers=False)
    judge = HeldOut(graph, evaluation, Batches(graph, samples, indices, attention), held, config)
    found = judge(state.hard_parameters(start))
    if not np.isfinite(found).all():
        raise GradientError("the errors of layers or outputs are beyond the numbers of float32.")
    balance = Balance.of(found, config.output_share)
    if not balance.fits:
        raise GradientError("the errors of layers or outputs are too small for float32.")
    kept = Kept(start, balance(found))
    batches = Batches(graph, samples, indices, attention * balance.columns(graph))
    layer_weights = balance.units[0] * layer_weights
    session = GradientSession(graph.train, integers=False)
    batch = min(max(1, config.batch_size // samples.rows), len(seen))
    rng = np.random.default_rng(config.seed)
    queue, losses, seconds = _resumed(hooks.partial, state, kept, rng)
    for step in range(len(losses), total):
        while len(queue) < batch:
            queue.extend(rng.permutation(seen).tolist())
        chosen, queue = np.array(queue[:batch]), queue[batch:]
        losses.append(state.step(session, batches, chosen, layer_weights, step, rng))
        if not np.isfinite(losses[-1]):
            raise GradientError(f"the loss of step {step + 1} is not a number.")
        hooks.progress(step + 1, total, losses[-1])
        if (step + 1) * _CHECKPOINTS // total > step * _CHECKPOINTS // total:
            candidate = state.harden()
            fruitless = kept.offer(step + 1, candidate, balance(judge(state.hard_parameters(candidate))))
            # Undecided weights need all the steps, and full ones.
            if config.rounding is not RoundingVariable.SOFT:
                if fruitless:
                    state.slow_down()
                if config.patience and (fruitless >= config.patience or kept.is_settled):
                    break
            work = {"learned": state.saved(), "kept": kept.saved(), "random": rng.bit_generator.state}
            so_far = {"queue": queue, "losses": losses, "seconds": seconds + time.perf_counter() - began}
            hooks.partial.save(step + 1, {**work, **so_far})
    if kept.step:
        runs = batches.runs(np.arange(len(indices)), state.hard_parameters(kept.rounding), evaluation)
        restored = _restored(plan, graph, evaluation, runs, len(indices), kept.rounding)
        kept.amend(restored, balance(judge(state.hard_parameters(restored))))
    trace = OptimizationTrace(
        steps=len(losses),
        losses=tuple(losses),
        checkpoints=tuple(kept.checkpoints.items()),
        best_step=kept.step,
        flipped=_flipped(start, kept.rounding),
        seconds=seconds + time.perf_counter() - began,
        reason=kept.reason(len(losses), total),
    )
    return kept.rounding, trace


def _resumed(
    partial: Partial, state: Learned, kept: Kept, rng: np.random.Generator
) -> tuple[list[int], list[float], float]:
    """Go on from the work that was kept: the samples to come, the losses and the seconds so far; at first
    there are none."""
    work = partial.load()
    if work is None:
        return [], [], 0.0
    state.restore(work["learned"])
    kept.restore(work["kept"])
    rng.bit_generator.state = work["random"]
    return work["queue"], work["losses"], work["seconds"]


def _restored(
    plan: Plan, graph: TrainingGraph, session: Session, runs: Iterable[Feeds], count: int, rounding: Rounding
) -> Rounding:
    """The rounding with the slopes and means of the float network in the last layers, by their weights'
    scales and biases.

    The runs are those of ``rounding`` for ``count`` samples.
    """
    shared = plan.shared_weights
    layers = [x for x, last in zip(plan.layers, graph.last, strict=True) if last and x.weight not in shared]
    if not layers:
        return rounding

    def compared(feeds: Feeds) -> list[Comparison]:
        values = session.run(feeds, [side + x.output for x in layers for side in (TEACHER, "")])
        pairs = (
            (
                np.moveaxis(v, x.output_axis, -1)
                for v in _both_finite(*(values[side + x.output] for side in (TEACHER, "")))
            )
            for x in layers
        )
        return [Comparison.of(*pair) for pair in pairs]

    weights, biases = dict(rounding.weights), dict(rounding.biases)
    for layer, parts in zip(layers, zip(*ordered_map(compared, runs), strict=True), strict=True):
        # Without the fillers of the last run.
        seen = Comparison.joined(parts, count / (len(parts) * graph.micro_batch))
        params, (exact, rough) = weights[layer.weight], seen.means
        # Where all channels, or those of several groups, have one scale, they have one gain.
        gain = seen.gains if params.scale.shape == exact.shape else seen.gains.mean()
        weights[layer.weight] = layer.weight_spec.params(params.scale * gain, params.zero_point)
        if layer.weight_spec.scales is not ScaleRule.ANY:
            gain = weights[layer.weight].scale / params.scale
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
