"""What passes do with a plan: try a part of it, and plan again."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx.execute.deviation import Deviation
from eptq_onnx.method.calibrate import calibrate
from eptq_onnx.method.diagnose import part_of
from eptq_onnx.method.float_fallback import SAMPLES
from eptq_onnx.method.plan import plan as make_plan
from eptq_onnx.method.qdq import write
from eptq_onnx.passes.base import Context, State
from eptq_onnx.records import Rounding


def with_activations(state: State, ctx: Context, names: Sequence[str]) -> tuple[ModelProto, dict[str, str]]:
    """Return the float network with some activations quantized, and which tensor holds whose values."""
    plan = part_of(state.plan, (), names)
    marked, stands_for = write(state.model, plan, Rounding({}, {}, state.calibration.grids, {}, {}))
    return ctx.executed(marked, stands_for), stands_for


def deviation_of(state: State, ctx: Context, indices: NDArray[np.int64] | None = None) -> Deviation:
    """Return what measures the noise of quantized activations, by default on training samples."""
    samples, chosen = ctx.samples_of(state.plan), ctx.walked if indices is None else indices
    return Deviation(state.executed, samples, chosen, SAMPLES, state.calibration.variance, ctx.config)


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
    return replanned(
        state.changed(
            left_float={**state.left_float, **tensors} if tensors else state.left_float,
            float_nodes={**state.float_nodes, **nodes} if nodes else state.float_nodes,
            exact=state.exact | set(exact) if exact else state.exact,
        ),
        ctx,
    )


def quantize_in_every_run(state: State, ctx: Context, layers: Collection[str]) -> State:
    """Replan with further layers whose inputs are quantized in every run."""
    return replanned(state.changed(dynamic=state.dynamic | set(layers)), ctx)


def replanned(state: State, ctx: Context) -> State:
    """Plan again with the options of a context; ranges that still fit are kept, others are chosen."""
    plan = make_plan(
        state.model,
        ctx.target,
        ctx.config,
        state.left_float,
        state.float_nodes,
        state.exact,
        state.dynamic,
    )
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
    return state.changed(plan=plan, calibration=calibration)
