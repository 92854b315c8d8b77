"""Learn for the whole network at once which weights round up and which round down."""

from __future__ import annotations

from dataclasses import replace

from eptq_onnx.data.samples import Samples
from eptq_onnx.method.judge import still_better
from eptq_onnx.outcome import OptimizationTrace
from eptq_onnx.passes.base import Context, Cost, Judge, Pass, State
from eptq_onnx.passes.plans import with_activations
from eptq_onnx.training.graph import training_graph
from eptq_onnx.training.loop import Hooks, needed_bytes, optimize
from eptq_onnx.training.worth import LITTLE, Effort, is_learned, promised


class Optimize(Pass):
    """Learn for the whole network at once which weights round up and which round down.

    See `eptq_onnx.training`.
    """

    name = "optimize"
    requires = ("calibration", "nearest", "rounding")
    provides = ("rounding", "trace")
    switch = ("steps", 0)
    without = "not optimized over the whole network"

    def enabled(self, ctx: Context) -> bool:
        """Return True if there are optimization steps."""
        return ctx.config.optimizes

    def cost(self, state: State, ctx: Context) -> Cost:
        """Forward and backward passes of both networks in each step, and checks."""
        scored = len(ctx.shares.scored)
        effort = Effort.of(ctx.config, state.plan, ctx.samples_of(state.plan), scored, len(ctx.shares.held))
        return Cost(passes=effort.passes * scored, steps=effort.steps)

    def memory(self, state: State, samples: Samples) -> int:
        """Weights with their optimizer state, and the tensors of one batch."""
        return needed_bytes(state.executed, state.plan, samples)

    def run(self, state: State, ctx: Context) -> State:
        """Run the loop from the current rounding, and keep its result if it is better on unseen samples.

        Without a given number of steps, it runs only where it can gain something.
        """
        judge, start = Judge(state, ctx), state.rounding
        unpromising = None if ctx.config.steps is not None else _unpromising(state, ctx, judge)
        if unpromising is not None:
            return state.changed(trace=OptimizationTrace(reason=unpromising))
        scored = ctx.chosen(ctx.shares.scored, state.plan)
        graph = training_graph(state.network, start, scored, ctx.config, ctx.gradients)
        notes = [f"no gradient passes {note}" for note in graph.notes]
        notes += [f"weight {name} is not optimized: {why}" for name, why in graph.unreached.items()]

        def tell(done: int, total: int, loss: float) -> None:
            ctx.progress(self.name, done, total, f"loss {loss:.4g}")

        rounding, trace = optimize(
            state.network, start, graph, scored, ctx.shares.held, ctx.config, Hooks(tell, ctx.partial)
        )
        if not still_better(judge.noise, judge.limit, start, rounding):
            notes.append(
                "the start of the optimization is kept: outputs of its result are noisier than those of "
                "the start or of nearest rounding"
            )
            rounding, trace = start, replace(trace, best_step=0)
        return state.changed(rounding=rounding, trace=trace).noting(*notes)


def _unpromising(state: State, ctx: Context, judge: Judge) -> str | None:
    """Return why an optimization would gain too little, as a sentence; None if it may gain enough."""
    total = judge.noise(state.rounding)
    if not total.size:
        return None
    learned = {q.name for q in state.plan.activations if is_learned(q, ctx.config)}
    fixed = [name for name in state.plan.activation_names if name not in learned]
    share = promised(total, judge.noise_of(*with_activations(state, ctx, fixed)))
    if share >= LITTLE:
        return None
    return (
        f"not started: it could take less than {100 * LITTLE:g} % off the noise of the outputs, because "
        "quantized activations cause most of it, which no rounding of weights changes"
    )
