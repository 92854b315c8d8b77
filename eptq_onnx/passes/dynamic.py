"""Quantize the inputs of matrix products in every run where fixed ranges cause much more noise."""

from __future__ import annotations

from eptq_onnx.config import Activations
from eptq_onnx.method.float_fallback import SAMPLES
from eptq_onnx.passes.base import Context, Cost, Pass, State
from eptq_onnx.passes.plans import deviation_of, leave_float, quantize_in_every_run, with_activations

_LESS, _MUCH_LESS = 0.7, 0.5
"""Ratios of noise below which products get other ranges, and below which all else stays float: 1.5, 3 dB."""
_UNNOTICED = 1e-3
"""Noise that need not be lowered: 30 dB below the outputs. Files with fixed ranges run on more runtimes."""
_BULK, _NEARLY_ALL = 0.5, 0.9
"""Shares of the multiplications on integers that products must have, and for all else to stay float.

Fixed ranges serve convolutions well, and a convolution in float is slow.
"""


class Dynamic(Pass):
    """Quantize the inputs of matrix products in every run where fixed ranges cause much more noise.

    Only where most multiplications are those of such products. The float network runs with all activations
    quantized as planned; with the inputs of the products quantized by the ranges they have in every run, and
    without what then nothing asks for, such as a quantized sum in front of them; and so that everything else
    stays float.
    """

    name = "dynamic"
    requires = ("calibration",)
    provides = ("plan", "calibration", "dynamic", "float_nodes")

    def enabled(self, ctx: Context) -> bool:
        """Return True if the options leave it open and the target has kernels."""
        return ctx.config.activations is Activations.AUTO and bool(ctx.target.dynamic)

    def cost(self, state: State, ctx: Context) -> Cost:
        """Runs of the float network, and with each kind of ranges."""
        return Cost(passes=4.0 * min(len(ctx.shares.scored), SAMPLES) if _share(state, ctx) >= _BULK else 0.0)

    def run(self, state: State, ctx: Context) -> State:
        """Measure, and replan."""
        share = _share(state, ctx)
        products = quantize_in_every_run(state, ctx, _products(state, ctx)) if share >= _BULK else state
        if not products.plan.dynamic:
            return state
        # On single samples, as ranges that are found in every run need them, and on those that fixed ranges
        # have not seen.
        deviation = deviation_of(products, ctx, ctx.shares.judged)
        if not deviation.parts:
            return state

        def noise(of: State) -> float:
            return deviation(*with_activations(of, ctx, of.plan.activation_names))

        fixed = noise(state)
        if fixed <= _UNNOTICED:
            return state
        best, least = state, fixed
        alone = _products_alone(products, ctx) if share >= _NEARLY_ALL else None
        for other, ratio in ((products, _LESS), (alone, _MUCH_LESS)):
            if other is not None and (found := noise(other)) < ratio * least:
                best, least = other, found
        if best is state:
            return state
        count = sum(x.dynamic for x in best.plan.layers)
        return best.noting(
            f"{count} layers find the ranges of their inputs in every run: "
            f"so quantized activations cause noise of {least:.2%} of the outputs' power, and with fixed "
            f"ranges {fixed:.2%}"
        )


def _products(state: State, ctx: Context) -> list[str]:
    """Return the layers that can do without fixed ranges."""
    return [x.node for x in state.plan.static_layers if x.op_type in ctx.target.dynamic]


def _share(state: State, ctx: Context) -> float:
    """Return the share of the multiplications on integers that products have; all if none are known."""
    products = _products(state, ctx)
    work = {x.node: ctx.multiplications.get(x.node, 0.0) for x in state.plan.static_layers}
    total = sum(work.values())
    return sum(work[name] for name in products) / total if total else float(bool(products))


def _products_alone(state: State, ctx: Context) -> State | None:
    """Return the state with nothing but dynamic layers on integers; None if it is that already."""
    others = state.plan.integer_nodes
    if not others:
        return None
    reason = "fixed ranges would cause more noise than all others, which are found in every run"
    return leave_float(state, ctx, {}, dict.fromkeys(others, reason))
