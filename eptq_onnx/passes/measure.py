"""Compare the speed of the float and the quantized model on this machine."""

from __future__ import annotations

from eptq_onnx import runtimes
from eptq_onnx.config import Objective
from eptq_onnx.errors import ModelError
from eptq_onnx.graph import io
from eptq_onnx.graph.branches import sink
from eptq_onnx.outcome import Pace
from eptq_onnx.passes.base import Context, Cost, Pass, State
from eptq_onnx.proto import store
from eptq_onnx.runtimes.speed import SECONDS, measure
from eptq_onnx.targets import ONNXRUNTIME


class Measure(Pass):
    """Compare the speed of the float and the quantized model on this machine.

    See `eptq_onnx.runtimes.speed`.
    """

    name = "speed"
    requires = ("packed",)
    provides = ("speed",)
    repeats = True

    def enabled(self, ctx: Context) -> bool:
        """Return True if the option is on."""
        return ctx.config.measure_speed

    def cost(self, state: State, ctx: Context) -> Cost:
        """Both models in turn for a while, and a profile of each."""
        return Cost(seconds=SECONDS if ctx.target.verifier == ONNXRUNTIME else 0.0)

    def run(self, state: State, ctx: Context) -> State:
        """Time both models, or note why that is not possible."""
        if ctx.target.verifier != ONNXRUNTIME:
            return state.noting(
                f"speed is not measured: {ctx.target.name} is for a runtime other than onnxruntime"
            )
        quantized = sink(state.packed)
        if store.is_large(quantized):
            return state.noting("speed is not measured: both models together would take too much memory")
        part = next(ctx.samples.parts(range(ctx.samples.count), ctx.samples.fixed_batch or 1))
        try:
            pair = io.load(ctx.source, ctx.folder), quantized
            speed = measure(runtimes.make(), pair, ctx.samples.take(part), len(part))
        except ModelError as e:
            return state.noting(f"speed is not measured: {e}")
        state = state.changed(speed=speed)
        if speed.pace is Pace.SLOWER and ctx.config.objective is Objective.INTEGERS:
            return state.noting("with objective=time, operators that are slower on integers here stay float")
        return state
