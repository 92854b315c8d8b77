"""Insert QuantizeLinear and DequantizeLinear nodes and the integer weights."""

from __future__ import annotations

from onnx import ModelProto

from eptq_onnx._version import __version__
from eptq_onnx.method.qdq import write
from eptq_onnx.passes.base import Context, Pass, State, Written

_PREFIX = "eptq_onnx."
"""Prefix of metadata keys."""


class Write(Pass):
    """Insert QuantizeLinear and DequantizeLinear nodes and the integer weights.

    See `eptq_onnx.method.qdq`.
    """

    name = "write"
    requires = ("rounding",)
    provides = ("written",)

    def run(self, state: State, ctx: Context) -> State:
        """Write the model, with metadata that says what made it."""
        marked, stands_for = write(state.model, state.plan, state.rounding)
        _sign(marked, ctx)
        return state.changed(written=Written(marked, stands_for))


def _sign(model: ModelProto, ctx: Context) -> None:
    """Record version, target and options in the metadata, in place."""
    model.producer_version = __version__
    kept = [(p.key, p.value) for p in model.metadata_props if not p.key.startswith(_PREFIX)]
    made = {"version": __version__, "target": ctx.target.name, "options": ctx.given.digest(ctx.target)}
    del model.metadata_props[:]
    for key, value in [*kept, *((_PREFIX + key, value) for key, value in made.items())]:
        model.metadata_props.add(key=key, value=value)
