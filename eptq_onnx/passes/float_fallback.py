"""Keep activations in floating point if quantizing them alone would ruin the outputs."""

from __future__ import annotations

from functools import partial

from eptq_onnx.method.float_fallback import FLOAT_PASSES, SAMPLES, sensitive_activations
from eptq_onnx.passes.base import Context, Cost, Pass, State
from eptq_onnx.passes.plans import leave_float, with_activations


class FloatFallback(Pass):
    """Keep activations in floating point if quantizing them alone would ruin the outputs.

    See `eptq_onnx.method.float_fallback`.
    """

    name = "float fallback"
    requires = ("calibration",)
    provides = ("plan", "calibration", "left_float", "sensitivity")

    def enabled(self, ctx: Context) -> bool:
        """Return True if noise is limited."""
        return ctx.config.activation_noise > 0

    def cost(self, state: State, ctx: Context) -> Cost:
        """Runs with all quantizers at once; more are rarely needed."""
        return Cost(passes=FLOAT_PASSES * min(len(ctx.shares.scored), SAMPLES), builds=2)

    def run(self, state: State, ctx: Context) -> State:
        """Measure, and replan without the activations that are too noisy."""
        quantized = partial(with_activations, state, ctx)
        found = sensitive_activations(
            state.network, quantized, ctx.chosen(ctx.walked, state.plan), ctx.config, ctx.tell(self.name)
        )
        reasons = {
            t: f"quantizing {t} alone would cause noise of {ratio:.1%} of the outputs' power"
            for t, ratio in found.loud.items()
        }
        return leave_float(state, ctx, reasons).changed(sensitivity=found)
