"""Choose the bits of every weight within limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from onnx import ModelProto

from eptq_onnx.config import Objective, Start
from eptq_onnx.graph.branches import sink
from eptq_onnx.graph.file_count import FileCount, FileSizes, Storing
from eptq_onnx.graph.message_sizes import file_bytes
from eptq_onnx.graph.packing import weights_of
from eptq_onnx.graph.storing import stored
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.allocate import (
    SAMPLES,
    WIDTHS,
    Candidates,
    Goal,
    candidates,
    front_of,
    keeps_within,
    solve,
    with_widths,
)
from eptq_onnx.method.fit_bytes import fit_bytes, smallest_file
from eptq_onnx.method.qdq import write
from eptq_onnx.method.ranges import weight_ranges
from eptq_onnx.method.signature import sign
from eptq_onnx.passes.base import Context, Cost, Pass, State, deviation_of, with_activations
from eptq_onnx.program import BYTES, NOISE
from eptq_onnx.records import Plan

_TRIALS = 4
"""Maximum number of files written to correct the count."""


class Allocate(Pass):
    """Choose the bits of every weight within limits.

    See `eptq_onnx.method.allocate`, and `eptq_onnx.method.fit_bytes` where the bytes of the file count.
    """

    name = "allocate"
    requires = ("calibration",)
    provides = ("plan", "front")

    def enabled(self, ctx: Context) -> bool:
        """True if there is a budget, or if the file should be as small as possible."""
        return ctx.config.chooses_widths

    def cost(self, state: State, ctx: Context) -> Cost:
        """One run per layer."""
        return Cost(passes=SAMPLES * len(state.plan.layers))

    def run(self, state: State, ctx: Context) -> State:
        """Choose the bits of every weight."""
        selection, tell = ctx.chosen(ctx.walked), ctx.tell(self.name)
        found = candidates(state.network, selection, ctx.target, ctx.config, tell)
        widths, sizes = _chosen(state, ctx, found, _goal(state, ctx))
        plan = with_widths(state.plan, widths, ctx.target)
        return state.changed(plan=plan, front=front_of(found, sizes, widths))


def _goal(state: State, ctx: Context) -> Goal:
    """Return the goal that the options set; the noise of activations is measured if it counts."""
    config = ctx.config
    if config.objective is not Objective.BYTES:
        return Goal(NOISE, config.width_budgets)
    deviation = deviation_of(state, ctx)
    noise = 0.0
    if deviation.parts:
        noise = deviation(*with_activations(state, ctx, [q.name for q in state.plan.activations]))
    return Goal(BYTES, config.width_budgets, config.max_noise, noise)


def _chosen(
    state: State, ctx: Context, found: Mapping[str, Candidates], goal: Goal
) -> tuple[dict[str, int], FileSizes]:
    """Return the widths that meet the goal, and the sizes of the file's parts.

    Where bytes count, files are written with the chosen widths, and what they take corrects the count.
    """
    written = _trial(state, ctx, state.plan)
    names = dict(zip(state.plan.weight_specs, weights_of(GraphView(written)), strict=False))
    storing = _storing(state.plan, ctx)
    count = FileCount(written, names, storing)
    widths = _meeting(found, goal, count)
    for trial in range(_TRIALS if goal.counts_bytes else 0):
        plan = with_widths(state.plan, widths, ctx.target)
        made, _ = stored(_trial(state, ctx, plan), storing.storage, storing.types)
        more = file_bytes(sink(made)) - count.bytes(widths)
        if more == 0 or (more < 0 and trial):
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


def _trial(state: State, ctx: Context, plan: Plan) -> ModelProto:
    """Return a file with these widths and weights rounded to nearest, in int8."""
    extremes = weight_ranges(state.executed, plan, state.calibration, state.scores, ctx.config, searched=())
    learned = ctx.config.optimizes or ctx.config.start is Start.CLOSED_FORM
    biases = {
        name: np.ones_like(values) if learned and not values.any() else values
        for name, values in extremes.biases.items()
    }
    written, _ = write(state.model, plan, replace(extremes, biases=biases))
    sign(written, ctx.given, ctx.target)
    return written


def _storing(plan: Plan, ctx: Context) -> Storing:
    """Return how weights are stored, and which of them may need zero points."""
    specs = {
        layer.weight: {
            bits: ctx.target.of(layer.op_type).weight_spec(bits, layer.weight_spec.axis, layer.depthwise)
            for bits in WIDTHS
        }
        for layer in plan.layers
    }
    return Storing(
        ctx.target.storage_for(ctx.config.storage),
        ctx.target.weight.storage,
        {name: {bits: not spec.symmetric for bits, spec in of.items()} for name, of in specs.items()},
    )
