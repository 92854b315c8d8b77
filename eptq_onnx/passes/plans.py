"""What passes do with a plan: try a part of it, and plan again."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from eptq_onnx.execute.deviation import Deviation
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.allocate import Work
from eptq_onnx.method.calibrate import calibrate
from eptq_onnx.method.diagnose import part_of
from eptq_onnx.method.float_fallback import SAMPLES
from eptq_onnx.method.plan import plan as make_plan
from eptq_onnx.method.plan.wide import activations_of, with_wide
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


def with_activation_bits(state: State, ctx: Context, widths: Collection[int]) -> dict[int, State]:
    """Return the state replanned with every activation of each width, or of the nearest that it can have.

    Parameters
    ----------
    state : State
        That with the largest width.
    ctx : Context
    widths : collection of int
    """
    others = {
        bits: replace(ctx, config=ctx.config.model_copy(update={"activation_bits": bits}))
        for bits in sorted(widths)[:-1]
    }
    return {**{bits: replanned(state, other) for bits, other in others.items()}, max(widths): state}


def with_activation_widths(every: Mapping[int, State], widths: Mapping[str, int], ctx: Context) -> State:
    """Return the state in which each activation has a width of its own.

    A constant has that of the widest activation of its readers.

    Parameters
    ----------
    every : mapping of int to State
        See `with_activation_bits`.
    widths : mapping of str to int
        Quantizer to its bits.
    ctx : Context
    """
    base = every[max(every)]
    view = GraphView(base.model)
    known = {(q.name, q.spec.bits): (q, s) for s in every.values() for q in s.plan.activations}
    constants = {bits: {q.name: (q, s) for q in s.plan.operands} for bits, s in every.items()}
    activations = [known[q.name, widths[q.name]] for q in base.plan.activations]
    bits = {t: q.spec.bits for q, _ in activations for t in q.tensors}
    most: dict[str, int] = {}
    for inputs, outputs in activations_of(base.plan, view).values():
        around = max((bits[t] for t in (*inputs, *outputs) if t in bits), default=min(every))
        most |= {t: max(around, most.get(t, 0)) for t in inputs}
    operands = []
    for operand in base.plan.operands:
        wanted = max((most.get(t, 0) for t in operand.tensors), default=0)
        own = min((b for b in every if b >= wanted), default=max(every))
        operands.append(constants[own][operand.name])
    plan = replace(
        base.plan,
        activations=tuple(q for q, _ in activations),
        operands=tuple(q for q, _ in operands),
    )
    grids = {q.name: s.calibration.grids[q.name] for q, s in activations}
    grids |= {q.name: s.calibration.grids[q.name] for q, s in operands}
    calibration = replace(base.calibration, grids={**base.calibration.grids, **grids})
    return base.changed(plan=with_wide(plan, view, ctx.target), calibration=calibration)


def values_of(state: State, ctx: Context) -> dict[str, float]:
    """Return the values that each activation quantizer rounds for one sample; 1 if that is not known."""
    size = ctx.samples.fixed_batch or 1
    view = GraphView(specialize(state.executed, ctx.samples.two_batches(size)))
    shapes = {t: view.static_shape(t) for q in state.plan.activations for t in q.tensors}
    return {
        q.name: max(sum(math.prod(shapes[t] or (0,)) for t in q.tensors) / size, 1.0)
        for q in state.plan.activations
    }


def works_of(state: State, ctx: Context) -> list[Work]:
    """Return what each layer on integers multiplies."""
    known = {t: q.name for q in state.plan.activations for t in q.tensors}
    layers = [x for x in state.plan.static_layers if x.input in known]
    return [
        Work(x.weight, ctx.multiplications.get(x.node, 0.0), known[x.input], known.get(x.result, ""))
        for x in layers
    ]
