"""Other versions of the network that passes measure or take: some activations quantized, another plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx.execute.deviation import Deviation
from eptq_onnx.method.calibrate import calibrate
from eptq_onnx.method.float_fallback import SAMPLES as NOISE_SAMPLES
from eptq_onnx.method.plan import plan as make_plan
from eptq_onnx.method.qdq import write
from eptq_onnx.passes.base import Context, State
from eptq_onnx.records import Plan, Rounding


def with_activations(state: State, ctx: Context, names: Sequence[str]) -> tuple[ModelProto, dict[str, str]]:
    """Quantize some activations of the float network only.

    Returns the model, and which tensor holds the values of each quantized one.
    """
    wanted, plan = set(names), state.plan
    plan = replace(
        plan,
        layers=(),
        activations=tuple(q for q in plan.activations if q.name in wanted),
        dynamic=tuple(q for q in plan.dynamic if q.name in wanted),
        operands=(),
        tables=(),
        integer_nodes={},
        absorbed={},
    )
    marked, stands_for = write(state.model, plan, Rounding({}, {}, state.calibration.grids, {}, {}))
    return ctx.executed(marked, stands_for), stands_for


def deviation_of(state: State, ctx: Context, indices: NDArray[np.int64] | None = None) -> Deviation:
    """Return what measures the noise of quantized activations, by default on training samples."""
    samples, chosen = ctx.samples_of(state.plan), ctx.walked if indices is None else indices
    return Deviation(state.executed, samples, chosen, NOISE_SAMPLES, state.calibration.variance, ctx.config)


def without_equal_steps(plan: Plan) -> str | None:
    """Return a type of weights or activations whose steps grow with the values; None if there is none."""
    specs = [*plan.weight_specs.values(), *(q.spec for q in plan.activations)]
    return next((spec.format.type_name for spec in specs if not spec.format.has_equal_steps), None)


def leave_float(
    state: State,
    ctx: Context,
    tensors: Mapping[str, str],
    nodes: Mapping[str, str] | None = None,
    exact: Collection[str] = (),
) -> State:
    """Replan with further tensors and nodes in floating point, each with its reason.

    Weights around those that are ``exact`` stay float, too.
    """
    if not tensors and not nodes and not exact:
        return state
    return _replanned(state, ctx, tensors, nodes or {}, exact)


def quantize_in_every_run(state: State, ctx: Context, layers: Collection[str]) -> State:
    """Replan with further layers whose inputs are quantized in every run."""
    return _replanned(state.changed(dynamic=state.dynamic | set(layers)), ctx, {}, {}, ())


def _replanned(
    state: State, ctx: Context, tensors: Mapping[str, str], nodes: Mapping[str, str], exact: Collection[str]
) -> State:
    """Return the state with a new plan, and the ranges that it needs."""
    left = {**state.left_float, **tensors} if tensors else state.left_float
    kept = {**state.float_nodes, **nodes} if nodes else state.float_nodes
    around = state.exact | set(exact) if exact else state.exact
    plan = make_plan(state.model, ctx.target, ctx.config, left, kept, around, state.dynamic)
    # What is left of a group may want another range.
    before = {q.name: q for q in state.plan.quantizers}
    same = {q.name: state.calibration.grids[q.name] for q in plan.quantizers if before.get(q.name) == q}
    channels = state.scores.channels if state.scores is not None else None
    calibration = calibrate(
        state.executed,
        plan,
        ctx.training,
        ctx.config,
        ctx.tell("calibrate"),
        scores=channels,
        known=replace(state.calibration, grids=same),
    )
    return state.changed(plan=plan, calibration=calibration, left_float=left, float_nodes=kept, exact=around)
