"""Leave those activations float that choices by value are made from, where errors make them fall on other
rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from onnx import ModelProto

from eptq_onnx.method.choices import FLOAT_PASSES, SAMPLES, deciding_activations
from eptq_onnx.method.qdq import write
from eptq_onnx.method.ranges import weight_ranges
from eptq_onnx.passes.base import Context, Cost, Pass, State, leave_float
from eptq_onnx.records import Rounding


class KeepChoices(Pass):
    """Leave activations float where their errors would make the network choose other rows.

    See `eptq_onnx.method.choices`.
    """

    name = "choices"
    requires = ("calibration",)
    provides = ("plan", "calibration", "left_float")

    def enabled(self, ctx: Context) -> bool:
        """True if the network chooses anything by value."""
        return any(not place.draws for place in ctx.found.places)

    def cost(self, state: State, ctx: Context) -> Cost:
        """Both networks, with choices of their own and without."""
        return Cost(passes=FLOAT_PASSES * min(len(ctx.walked), SAMPLES))

    def run(self, state: State, ctx: Context) -> State:
        """Measure, and plan anew without what choices are made from."""
        tried = _Tried(state, ctx)
        walked = ctx.samples.only(ctx.walked)
        tell = ctx.tell(self.name)
        deciding, note = deciding_activations(
            state.model, state.plan, tried.rounded, walked, ctx.multiplications, ctx.found, tell
        )
        return tried.without(deciding).noting(*[note] if note else [])


class _Tried:
    """Plans in which further tensors stay float; each is made once."""

    def __init__(self, state: State, ctx: Context) -> None:
        self._state, self._ctx = state, ctx
        self._made: dict[frozenset[str], State] = {}
        self._nearest: Rounding | None = None

    def without(self, tensors: Mapping[str, str]) -> State:
        """The state in which these stay float, each for its reason."""
        key = frozenset(tensors)
        if key not in self._made:
            self._made[key] = leave_float(self._state, self._ctx, tensors)
        return self._made[key]

    def rounded(self, tensors: Mapping[str, str]) -> tuple[ModelProto, dict[str, str]]:
        """The quantized model of that state, with all weights rounded to nearest, and what stands for a
        tensor in it."""
        state = self.without(tensors)
        if self._nearest is None:
            self._nearest = weight_ranges(
                state.executed, state.plan, state.calibration, state.scores, self._ctx.config
            )
        return write(
            state.model, state.plan, replace(self._nearest, activations=state.calibration.activations)
        )
