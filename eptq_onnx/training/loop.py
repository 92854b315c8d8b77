"""Optimize weights, biases, and weight and activation scales of the whole network (paper section 4).

The loss is the sum of the layers' errors, weighted by sample-layer attention, and the errors of the network's
outputs, which make up half of it at the start. Attention is of first order and misleads where errors add up;
the outputs alone favour values that are too small. The result is the best hard-rounded candidate on samples
that the optimization has not seen, including the start. A candidate is the moving average of the parameters,
around which single steps fluctuate. It must beat the start sample by sample, by more than chance, and without
larger errors of the outputs. Minimizing squared errors shrinks outputs, rare strong responses most of all;
finally the last layers get back the slope that they have in the float network, if the result still beats the
start, and the outputs stay about as near.
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
from eptq_onnx.data.samples import Samples, Selection, spread
from eptq_onnx.engines.base import TEACHER, GradientSession, TrainingGraph
from eptq_onnx.errors import GradientError
from eptq_onnx.execute.micro import gradient_bytes, micro_batch
from eptq_onnx.graph.view import GraphView
from eptq_onnx.numerics.gains import Comparison
from eptq_onnx.numerics.scales import ScaleRule
from eptq_onnx.numerics.types import Array, Feeds
from eptq_onnx.outcome import OptimizationTrace
from eptq_onnx.parallel import ordered_map
from eptq_onnx.records import Network, Plan, Rounding
from eptq_onnx.runtime import Session
from eptq_onnx.training.attention import channel_attention, part_weights
from eptq_onnx.training.batches import Batches, HeldOut
from eptq_onnx.training.kept import Balance, Kept
from eptq_onnx.training.learned import Learned
from eptq_onnx.training.worth import RESTORED, Effort, views
from eptq_onnx.workdir import Partial

_BYTES_A_WEIGHT = 40
"""Bytes per weight element.

They hold its value, target, float copy, optimizer state, average, rounded value and gradients.
"""
_BYTES_A_CONSTANT = 9
"""Bytes per element of a table: its value, its integer, and the dequantized value."""


@dataclass(frozen=True)
class Hooks:
    """Callbacks of the loop.

    Parameters
    ----------
    progress : callable
        Called with the number of steps done, the total, and the loss.
    partial : Partial
        Saves the state of the loop at its checks.
    """

    progress: Callable[[int, int, float], None]
    partial: Partial = field(default_factory=Partial)


def needed_bytes(model: ModelProto, plan: Plan, samples: Samples) -> int:
    """Return the approximate memory that `optimize` needs, in bytes.

    Parameters
    ----------
    model : ModelProto
        The normalized float model.
    plan : Plan
    samples : Samples
    """
    view = GraphView(model)
    weights = sum(math.prod(view.constant_shape(name)) for name in plan.weight_specs)
    constants = sum(math.prod(view.constant_shape(q.name)) for q in plan.constants)
    tensors = gradient_bytes(model, samples, micro_batch(model, samples))
    return _BYTES_A_WEIGHT * weights + _BYTES_A_CONSTANT * constants + tensors


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
        Without scores, or if ``config.attention`` is none, all layers and samples have the same weight.
    start : Rounding
    graph : TrainingGraph
    selection : Selection
        The scored samples, which are the rows of the tables in ``scores.channels``.
    held : ndarray of shape (n_held,)
        Positions in the selection of the samples that candidates are judged on. The others are trained on, or
        these as well if there are no others.
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
    effort = Effort.of(config, plan, samples, len(indices), len(held))
    state = Learned(plan, start, graph, calibration, config, effort)
    attention = channel_attention(plan, network.scores, graph.channels, len(indices), config)
    layer_weights = np.maximum.reduceat(attention, np.cumsum([0, *graph.channels[:-1]]), axis=1).mean(axis=0)
    attention = np.hstack([attention, np.tile(part_weights(graph, calibration), (len(indices), 1))])
    seen = np.setdiff1d(np.arange(len(indices)), held)
    seen = seen if len(seen) else held
    evaluation = GradientSession(graph.evaluate, integers=False)
    judge = HeldOut(
        graph,
        evaluation,
        Batches(graph, samples, indices, attention),
        held,
        views(effort.augments),
        config.seed,
    )
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
    rng = np.random.default_rng(config.seed)
    queue, losses, seconds = _resumed(hooks.partial, state, kept, rng)
    ended = ""
    for step in range(len(losses), effort.steps):
        while len(queue) < effort.batch:
            queue.extend(rng.permutation(seen).tolist())
        chosen, queue = np.array(queue[: effort.batch]), queue[effort.batch :]
        losses.append(state.step(session, batches, chosen, layer_weights, step, rng))
        if not np.isfinite(losses[-1]):
            raise GradientError(f"the loss of step {step + 1} is not a number.")
        hooks.progress(step + 1, effort.steps, losses[-1])
        if step + 1 in effort.checks:
            candidate = state.harden()
            fruitless = kept.offer(step + 1, candidate, balance(judge(state.hard_parameters(candidate))))
            # Undecided weights need all the steps at full size.
            if config.rounding is not RoundingVariable.SOFT:
                if fruitless:
                    state.slow_down()
                ended = effort.ending(kept.checkpoints, kept.is_settled)
                if ended:
                    break
            work = {"learned": state.saved(), "kept": kept.saved(), "random": rng.bit_generator.state}
            so_far = {"queue": queue, "losses": losses, "seconds": seconds + time.perf_counter() - began}
            hooks.partial.save(step + 1, {**work, **so_far})
    if kept.step:
        known = spread(len(indices), RESTORED)
        runs = batches.runs(known, state.hard_parameters(kept.rounding), evaluation)
        restored = _restored(plan, graph, evaluation, runs, len(known), kept.rounding)
        kept.settle(restored, balance(judge(state.hard_parameters(restored))))
    trace = OptimizationTrace(
        steps=len(losses),
        losses=tuple(losses),
        checkpoints=tuple(kept.checkpoints.items()),
        best_step=kept.step,
        flipped=_flipped(start, kept.rounding),
        seconds=seconds + time.perf_counter() - began,
        reason=kept.reason(f"{len(losses)} of {effort.steps} steps" + (ended and f"; {ended}")),
        passes=round(effort.spent(len(losses)) + (effort.restoring if kept.step else 0.0), 1),
    )
    return kept.rounding, trace


def _resumed(
    partial: Partial, state: Learned, kept: Kept, rng: np.random.Generator
) -> tuple[list[int], list[float], float]:
    """Restore saved work; return the queued samples, the losses and the seconds so far, empty at first."""
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
    """Return the rounding with the float network's slopes and means restored in the last layers.

    Only the weights' scales and the biases change. The runs are those of ``rounding`` for ``count`` samples.
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
        # Leave out the padding of the last run.
        seen = Comparison.joined(parts, count / (len(parts) * graph.micro_batch))
        grid, (exact, quantized) = weights[layer.weight], seen.means
        # If all channels, or those of several groups, share a scale, they share a gain.
        gain = seen.gains if grid.scale.shape == exact.shape else seen.gains.mean()
        weights[layer.weight] = layer.weight_spec.grid(grid.scale * gain, grid.zero_point)
        if layer.weight_spec.scales is not ScaleRule.ANY:
            gain = weights[layer.weight].scale / grid.scale
        if layer.bias is not None:
            biases[layer.bias] = np.asarray(gain * biases[layer.bias] + exact - gain * quantized, np.float32)
    return replace(rounding, weights=weights, biases=biases)


def _both_finite(exact: Array, quantized: Array) -> tuple[Array, Array]:
    """Return both arrays, with 0 in both where either is not finite, so that they agree there."""
    known = np.isfinite(exact) & np.isfinite(quantized)
    return (exact, quantized) if known.all() else (np.where(known, exact, 0), np.where(known, quantized, 0))


def _flipped(start: Rounding, end: Rounding) -> float:
    size = sum(i.size for i in start.integers.values())
    return sum(int((start.integers[n] != end.integers[n]).sum()) for n in start.integers) / max(size, 1)
