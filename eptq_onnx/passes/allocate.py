"""Choose the bits of every weight within limits."""

from __future__ import annotations

import math

import numpy as np

from eptq_onnx.config import Objective, WeightStorage
from eptq_onnx.execute.deviation import Deviation
from eptq_onnx.graph.packing import Packing, packed_bytes, shared_bytes
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.allocate import SAMPLES, WIDTHS, FileSizes, Goal, allocate
from eptq_onnx.method.float_fallback import SAMPLES as FALLBACK_SAMPLES
from eptq_onnx.method.qdq import write
from eptq_onnx.numerics.bitpacking import LAYOUTS
from eptq_onnx.numerics.types import Array
from eptq_onnx.passes.base import Context, Cost, Pass, State, with_activations
from eptq_onnx.program import BYTES, NOISE
from eptq_onnx.proto import store
from eptq_onnx.records import Plan, Rounding

_SIGNATURE = 256
"""Bytes of the metadata that say what made a file."""


class Allocate(Pass):
    """Choose the bits of every weight within limits.

    See `eptq_onnx.method.allocate`.
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
        plan, front = allocate(
            state.network, selection, ctx.target, _goal(state, ctx), ctx.config, tell, _file_sizes(state, ctx)
        )
        return state.changed(plan=plan, front=front)


def _goal(state: State, ctx: Context) -> Goal:
    """Return the goal that the options set; the noise of activations is measured if it counts."""
    config = ctx.config
    if config.objective is not Objective.BYTES:
        return Goal(NOISE, config.width_budgets)
    deviation = Deviation(
        state.executed, ctx.samples, ctx.walked, FALLBACK_SAMPLES, state.calibration.variance, config
    )
    noise = 0.0
    if deviation.parts:
        noise = deviation(*with_activations(state, ctx, [q.name for q in state.plan.activations]))
    return Goal(BYTES, config.width_budgets, config.max_noise, noise)


def _file_sizes(state: State, ctx: Context) -> FileSizes:
    """Return the sizes of the file's parts, from a file that has everything but the values.

    They are upper limits: a bias that may be learned counts as if it were there.
    """
    plan, view = state.plan, GraphView(state.model)
    written, _ = write(state.model, plan, _without_values(plan, view))
    shapes = {name: view.constant_shape(name) for name in plan.weight_specs}
    rest = store.model_bytes(written) - sum(math.prod(shape) for shape in shapes.values()) + _SIGNATURE
    storage = ctx.target.storage_for(ctx.config.storage)
    is_packed = storage is WeightStorage.PACKED
    sizes: dict[str, dict[int, int]] = {}
    for layer in plan.layers:
        shape = shapes[layer.weight]
        widths = ctx.target.weight.storage if storage is WeightStorage.NATIVE else ()
        sizes[layer.weight] = {
            bits: -(-math.prod(shape) * min((w for w in widths if w >= bits), default=8) // 8)
            for bits in WIDTHS
        }
        for bits in LAYOUTS.keys() & set(WIDTHS) if is_packed else ():
            spec = ctx.target.of(layer.op_type).weight_spec(bits, layer.weight_spec.axis, layer.depthwise)
            axis = None if spec.symmetric else spec.axis
            found = packed_bytes(Packing(f"{layer.weight}_quantized", shape, LAYOUTS[bits], axis))
            sizes[layer.weight][bits] = min(found, math.prod(shape))
    shared = {bits: shared_bytes(bits) for bits in LAYOUTS} if is_packed else {}
    return FileSizes(rest, sizes, shared)


def _without_values(plan: Plan, view: GraphView) -> Rounding:
    """Return a rounding whose arrays have the right types and shapes, and no meaning."""
    shapes = {name: view.constant_shape(name) for name in plan.weight_specs}
    channels = {
        name: () if spec.axis is None else (shapes[name][spec.axis],)
        for name, spec in plan.weight_specs.items()
    }
    rng = np.random.default_rng(0)
    rows = {q.name: view.constant_shape(q.name)[:1] for q in plan.tables}
    return Rounding(
        integers={name: np.zeros(shape, np.int8) for name, shape in shapes.items()},
        weights={n: s.grid(_distinct(rng, channels[n])) for n, s in plan.weight_specs.items()},
        grids={
            q.name: q.spec.grid(_distinct(rng, rows.get(q.name, ())), 0 if q.spec.symmetric else k % 128)
            for k, q in enumerate(plan.quantizers)
        },
        biases={
            x.bias: np.asarray(view.constant(x.bias), np.float32)
            if x.has_bias
            else np.ones(channels[x.weight] or shapes[x.weight][:1], np.float32)
            for x in plan.layers
            if x.bias is not None
        },
        targets={},
    )


def _distinct(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return scales that differ from all others: equal constants would share one initializer."""
    return np.asarray(rng.uniform(1, 2, shape), np.float32)
