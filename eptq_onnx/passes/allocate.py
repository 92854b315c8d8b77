"""Choose the bits of every weight within limits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from eptq_onnx.config import BudgetUnit, Config, Objective
from eptq_onnx.graph.branches import sink
from eptq_onnx.graph.file_count import FileCount, FileSizes
from eptq_onnx.graph.message_sizes import file_bytes
from eptq_onnx.graph.storing import stored
from eptq_onnx.method.allocate import (
    Candidates,
    Goal,
    Work,
    front_of,
    front_of_activations,
    keeps_within,
    mean_bits,
    measured,
    operations,
    solve,
    widths_of,
    with_widths,
)
from eptq_onnx.method.fit_bytes import fit_bytes, smallest_file
from eptq_onnx.method.float_fallback import SAMPLES
from eptq_onnx.passes.base import Context, Cost, Pass, State
from eptq_onnx.passes.plans import (
    deviation_of,
    values_of,
    with_activation_bits,
    with_activation_widths,
    with_activations,
    works_of,
)
from eptq_onnx.passes.trial import trial
from eptq_onnx.placement import FrontPoint
from eptq_onnx.program import BYTES, NOISE

_TRIALS = 4
"""Maximum number of files written to correct the count, and of choices that correct the noise."""
_PASSES, _LEAST_RUNS = 30, 32
"""Float passes that single activations are measured in, and the least number of runs."""
_OFF = 1.02
"""Factor by which noise may be off."""


class Allocate(Pass):
    """Choose the bits of every weight and of every activation within limits.

    See `eptq_onnx.method.allocate`, and `eptq_onnx.method.fit_bytes` where the bytes of the file count.
    Widths of activations are chosen first, along with the best widths of weights for them. The latter are
    then chosen again with what was measured: the noise of these activations, and the bytes of written files.
    """

    name = "allocate"
    requires = ("calibration", "effects")
    provides = ("plan", "calibration", "front")

    def enabled(self, ctx: Context) -> bool:
        """Return True if each weight or activation gets a width of its own."""
        return ctx.config.chooses_widths or ctx.config.activation_budget is not None

    def cost(self, state: State, ctx: Context) -> Cost:
        """Runs with each activation quantized alone, if their widths are chosen."""
        if ctx.config.activation_budget is None:
            return Cost()
        widths = ctx.target.activation_widths(ctx.config.activation_budget)
        alone = min(_runs(ctx), len(state.plan.activations) * len(widths))
        return Cost(passes=alone * min(SAMPLES, ctx.samples.count) + len(widths) * ctx.samples.count)

    def run(self, state: State, ctx: Context) -> State:
        """Choose the bits of every weight and activation."""
        works = None
        if ctx.config.activation_budget is not None and state.plan.activations:
            works = works_of(state, ctx)
            state = _narrowed(state, ctx, works)
        if not ctx.config.chooses_widths:
            return state
        found = _candidates(state, works)
        goal = _goal(state, ctx)
        widths, sizes = _chosen(state, ctx, found, goal)
        plan = with_widths(state.plan, widths, ctx.target)
        front = front_of(found, sizes, widths)
        return state.changed(plan=plan, front=_joint(state, front, goal) or front)


def _candidates(state: State, works: Sequence[Work] | None) -> dict[str, Candidates]:
    """Return the candidate widths of weights, with what their layers multiply on integers.

    Parameters
    ----------
    state : State
    works : sequence of Work, optional
        What layers multiply, if the widths of activations were chosen.
    """
    on_integers = {layer.weight for layer in state.plan.integer_layers}
    if works is None:
        known = {name: own.operations for name, own in state.effects.items()}
    else:
        known = operations(works, {q.name: q.spec.bits for q in state.plan.activations})
    return {
        name: replace(state.effects[name], operations=known.get(name, 0.0) if name in on_integers else 0.0)
        for name in state.plan.weight_specs
    }


def _narrowed(state: State, ctx: Context, works: Sequence[Work]) -> State:
    """Return the state with the best widths of activations.

    Raises
    ------
    ConfigError
        If no choice keeps within the limits.
    """
    config, deviation = ctx.config, deviation_of(state, ctx)
    assert config.activation_budget is not None
    every = with_activation_bits(state, ctx, ctx.target.activation_widths(config.activation_budget))
    names, runs, most = [q.name for q in state.plan.activations], itertools.count(1), _runs(ctx)

    def noise(some: Sequence[str], bits: int) -> float:
        ctx.tell(Allocate.name)(min(next(runs), most), most)
        return deviation(*with_activations(every[bits], ctx, some))

    found = measured(
        {name: sorted({own.plan.bits_of[name] for own in every.values()}) for name in names},
        values_of(state, ctx),
        noise if deviation.parts else None,
        most,
    )
    weights, sizes = _candidates(state, works) if config.chooses_widths else {}, FileSizes(0, {}, {})
    if weights:
        sizes = trial(state, ctx, state.plan).count.sizes({})
    goal = _goal_of_all(config)
    for _ in range(_TRIALS):
        widths = widths_of(found, weights, works, goal, sizes)
        mixed = with_activation_widths(every, widths, ctx)
        got = deviation(*with_activations(mixed, ctx, names)) if deviation.parts else 0.0
        foreseen = sum(found[name].effects[bits] for name, bits in widths.items())
        if not goal.other_limits or got <= _OFF * foreseen:
            break
        # Together they cause more than one by one.
        found = {
            name: replace(a, effects={b: n * got / max(foreseen, 1e-30) for b, n in a.effects.items()})
            for name, a in found.items()
        }
    wider = max(widths.values(), default=0)
    count, mean = sum(bits == wider for bits in widths.values()), mean_bits(found, widths)
    mixed = mixed.noting(
        f"activations of {wider} bits: {count} of {len(widths)}; a value has {mean:.2f} bits on average"
    )
    if got > config.activation_noise > 0:
        mixed = mixed.noting(
            f"activations of the chosen widths cause noise of {got:.1%} of the outputs' power, more than "
            f"max_noise: give more than budget activations={config.activation_budget:g}"
        )
    ctx.tell(Allocate.name)(most, most)
    return mixed.changed(front=front_of_activations(found, widths))


def _runs(ctx: Context) -> int:
    """Return how often the network runs to measure activations."""
    return max(_LEAST_RUNS, int(_PASSES * ctx.samples.count / SAMPLES))


def _goal_of_all(config: Config) -> Goal:
    """Return the goal for weights and activations together."""
    minimized = BYTES if config.objective is Objective.BYTES else NOISE
    budgets = tuple(b for b in config.budget if b.unit is not BudgetUnit.TIME)
    return Goal(minimized, budgets, math.inf if config.total_noise is None else config.total_noise)


def _goal(state: State, ctx: Context) -> Goal:
    """Return the goal that the options set; the noise of activations is measured if it counts."""
    config = ctx.config
    minimized = BYTES if config.objective is Objective.BYTES else NOISE
    if config.total_noise is None:
        return Goal(minimized, config.width_budgets)
    deviation = deviation_of(state, ctx)
    noise = 0.0
    if deviation.parts:
        noise = deviation(*with_activations(state, ctx, state.plan.activation_names))
    return Goal(minimized, config.width_budgets, config.total_noise, noise)


def _joint(state: State, front: Sequence[FrontPoint], goal: Goal) -> tuple[FrontPoint, ...]:
    """Return the front of regions and widths, with the point of these widths as it came out."""
    joint = () if state.placement is None else state.placement.front
    [own] = [point for point in front if point.chosen]
    return tuple(
        replace(own, noise=own.noise + goal.activation_noise, seconds=p.seconds, regions=p.regions)
        if p.chosen
        else p
        for p in joint
    )


def _chosen(
    state: State, ctx: Context, found: Mapping[str, Candidates], goal: Goal
) -> tuple[dict[str, int], FileSizes]:
    """Return the widths that meet the goal, and the sizes of the file's parts.

    Where bytes count, files are written with the chosen widths, and what they take corrects the count.
    """
    first = trial(state, ctx, state.plan)
    count = first.count
    widths = _meeting(found, goal, count)
    for k in range(_TRIALS if goal.counts_bytes else 0):
        plan = with_widths(state.plan, widths, ctx.target)
        made, _ = stored(trial(state, ctx, plan).model, first.storing.storage, first.storing.types)
        more = file_bytes(sink(made)) - count.bytes(widths)
        if more == 0 or (more < 0 and k):
            break
        count = count.corrected(more)
        widths = _meeting(found, goal, count)
    return widths, count.sizes(widths)


def _meeting(found: Mapping[str, Candidates], goal: Goal, count: FileCount) -> dict[str, int]:
    """Return the widths that meet the goal, with bytes as counted."""

    def choose(sizes: FileSizes, limit: int | None) -> dict[str, int]:
        return solve(found, goal.with_bytes(limit), sizes)

    if not goal.counts_bytes:
        return choose(count.sizes({}), None)
    if goal.minimized == BYTES:
        return smallest_file(choose, count, goal.bytes)
    assert goal.bytes is not None
    effects = {name: weight.effects for name, weight in found.items()}
    return fit_bytes(choose, effects, count, goal.bytes, lambda widths: keeps_within(found, goal, widths))
