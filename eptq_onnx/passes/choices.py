"""Keep activations in floating point if their errors would change choices made by value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from onnx import ModelProto

from eptq_onnx.method.choices import FLOAT_PASSES, SAMPLES, deciding_activations
from eptq_onnx.method.qdq import write
from eptq_onnx.method.ranges import weight_ranges
from eptq_onnx.passes.base import Context, Cost, Pass, State
from eptq_onnx.passes.plans import leave_float
from eptq_onnx.records import Rounding


class KeepChoices(Pass):
    """Keep activations in floating point if their errors would make the network choose other rows.

    See `eptq_onnx.method.choices`.
    """

    name = "choices"
    requires = ("calibration",)
    provides = ("plan", "calibration", "left_float", "exact")

    def enabled(self, ctx: Context) -> bool:
        """Return True if the network makes choices by value."""
        return any(not place.draws for place in ctx.found.places)

    def cost(self, state: State, ctx: Context) -> Cost:
        """Runs of both networks, with recorded choices and with their own."""
        return Cost(passes=FLOAT_PASSES * min(len(ctx.walked), SAMPLES))

    def run(self, state: State, ctx: Context) -> State:
        """Measure, and replan without the activations that choices depend on."""
        tried = _Tried(state, ctx)
        walked = ctx.samples.only(ctx.walked)
        tell = ctx.tell(self.name)
        deciding, note = deciding_activations(
            state.model, state.plan, tried.rounded, walked, ctx.multiplications, ctx.found, tell
        )
        return tried.without(deciding).noting(*[note] if note else [])


class _Tried:
    """Plans with further tensors in floating point; each is made once."""

    def __init__(self, state: State, ctx: Context) -> None:
        self._state, self._ctx = state, ctx
        self._made: dict[frozenset[str], State] = {}
        self._nearest: Rounding | None = None

    def without(self, tensors: Mapping[str, str]) -> State:
        """Return the state with these tensors in floating point, each with its reason."""
        key = frozenset(tensors)
        if key not in self._made:
            self._made[key] = leave_float(self._state, self._ctx, tensors, exact=tensors)
        return self._made[key]

    def rounded(self, tensors: Mapping[str, str]) -> tuple[ModelProto, dict[str, str]]:
        """Return that state's model with nearest rounding, and which tensor holds which values."""
        state = self.without(tensors)
        if self._nearest is None:
            self._nearest = weight_ranges(
                state.executed, state.plan, state.calibration, state.scores, self._ctx.config
            )
        return write(state.model, state.plan, replace(self._nearest, grids=state.calibration.grids))
