"""Choose the bits of every weight within limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from eptq_onnx.config import Objective
from eptq_onnx.graph.branches import sink
from eptq_onnx.graph.file_count import FileCount, FileSizes
from eptq_onnx.graph.message_sizes import file_bytes
from eptq_onnx.graph.storing import stored
from eptq_onnx.method.allocate import Candidates, Goal, front_of, keeps_within, solve, with_widths
from eptq_onnx.method.fit_bytes import fit_bytes, smallest_file
from eptq_onnx.passes.base import Context, Pass, State
from eptq_onnx.passes.plans import deviation_of, with_activations
from eptq_onnx.passes.trial import trial
from eptq_onnx.placement import FrontPoint
from eptq_onnx.program import BYTES, NOISE

_TRIALS = 4
"""Maximum number of files written to correct the count."""


class Allocate(Pass):
    """Choose the bits of every weight within limits.

    See `eptq_onnx.method.allocate`, and `eptq_onnx.method.fit_bytes` where the bytes of the file count.
    """

    name = "allocate"
    requires = ("calibration", "effects")
    provides = ("plan", "front")

    def enabled(self, ctx: Context) -> bool:
        """Return True if each weight gets a width of its own."""
        return ctx.config.chooses_widths

    def run(self, state: State, ctx: Context) -> State:
        """Choose the bits of every weight."""
        on_integers = {layer.weight for layer in state.plan.integer_layers}
        found = {
            name: state.effects[name] if name in on_integers else replace(state.effects[name], operations=0.0)
            for name in state.plan.weight_specs
        }
        goal = _goal(state, ctx)
        widths, sizes = _chosen(state, ctx, found, goal)
        plan = with_widths(state.plan, widths, ctx.target)
        front = front_of(found, sizes, widths)
        return state.changed(plan=plan, front=_joint(state, front, goal) or front)


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
