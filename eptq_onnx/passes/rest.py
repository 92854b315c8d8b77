"""Compute and store what stays float in the type that the option ``rest`` asks for."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
from onnx import ModelProto, TensorProto

from eptq_onnx.config import FloatType
from eptq_onnx.data.samples import spread
from eptq_onnx.graph import edit
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.integer_products import parts_of_products
from eptq_onnx.graph.narrow import narrow
from eptq_onnx.graph.view import GraphView
from eptq_onnx.passes.base import Context, Pass, State
from eptq_onnx.runtime import Session

_SAMPLES = 32
"""Number of samples on which magnitudes are measured."""
_ROOM = 2.0
"""Factor by which other samples may exceed the magnitudes of these."""
_TYPES = {FloatType.FLOAT16: TensorProto.FLOAT16, FloatType.BFLOAT16: TensorProto.BFLOAT16}


class Rest(Pass):
    """Compute and store what stays float in the type that the option ``rest`` asks for.

    See `eptq_onnx.graph.narrow`.
    """

    name = "rest"
    requires = ("written", "packed")
    provides = ("packed",)

    def enabled(self, ctx: Context) -> bool:
        """True for another type than float32."""
        return ctx.rest in _TYPES

    def run(self, state: State, ctx: Context) -> State:
        """Give tensors the type, and note what keeps float32."""
        flat = infer_shapes(ctx.executed(state.written.marked, state.written.stands_for))
        largest = _magnitudes(flat, ctx)
        wide = {*state.plan.integer_nodes, *parts_of_products(GraphView(state.packed))}
        found = narrow(state.packed, _TYPES[ctx.rest], largest, wide)
        counts, first = (
            Counter(found.wide.values()),
            {why: node for node, why in reversed(found.wide.items())},
        )
        notes = [
            f"{found.narrow} nodes compute in {ctx.rest.value}, {len(found.wide)} in float32",
            *(f"{first[why]} stays float32: {why}" for why in counts),
        ]
        return state.changed(packed=found.model).noting(*notes)


def _magnitudes(model: ModelProto, ctx: Context) -> dict[str, float]:
    """Return the largest finite magnitude of every float tensor, with room for other samples."""
    view = GraphView(model)
    names = [o for n in view.nodes for o in n.output if o and view.is_float(o)]
    session = Session(edit.exposing(model, names))
    largest: defaultdict[str, float] = defaultdict(float)
    indices = ctx.shares.training[spread(len(ctx.shares.training), _SAMPLES)]
    for part in ctx.samples.batches(indices, ctx.samples.fixed_batch or 1):
        feeds = session.taken(ctx.samples.take(part))
        for name, value in {**feeds, **session.run(feeds, names)}.items():
            if value.dtype == np.float32:
                finite = np.abs(value[np.isfinite(value)])
                largest[name] = max(largest[name], _ROOM * float(finite.max(initial=0)))
    return dict(largest)
