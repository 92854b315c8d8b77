"""Find out where the quantized network loses accuracy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from eptq_onnx.data.samples import Samples, spread
from eptq_onnx.diagnosis import Diagnosis, Loud, OutputNoise
from eptq_onnx.execute.deviation import Deviation
from eptq_onnx.execute.walk import affordable_batches
from eptq_onnx.graph.infer import infer_shapes
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.graph.view import GraphView
from eptq_onnx.method.diagnose import (
    SAMPLES,
    WALKS,
    Versions,
    layer_noise,
    loudest,
    only_weights,
    readers,
)
from eptq_onnx.method.qdq import write
from eptq_onnx.passes.base import Context, Cost, Pass, State
from eptq_onnx.passes.plans import with_activations
from eptq_onnx.records import Plan
from eptq_onnx.report.verdict import Assurance, judge_outputs
from eptq_onnx.targets import ONNXRUNTIME

_WORTH = 0.25
"""Share of the noise of the outputs from which on it is worth knowing which members cause it."""
_STEPS = 20
"""Runs to find causes, for the progress; there may be fewer, or a few more."""
_FEWER = 4
"""Samples that tell which part of a network is loudest."""
_A_RUN = 1.5
"""Cost of a run for one sample, in float passes."""
_FEW = 5
"""Bits of weights or activations below which the verdict is rarely safe."""


class Diagnose(Pass):
    """Find out which layers add noise and, where accuracy fell, what causes that of the outputs.

    See `eptq_onnx.method.diagnose`.
    """

    name = "diagnose"
    requires = ("nearest", "rounding", "written", "verification")
    provides = ("diagnosis",)

    def cost(self, state: State, ctx: Context) -> Cost:
        """Walks of three networks on a few samples, and the search for causes, more likely with few bits."""
        samples, pieces = min(len(ctx.shares.unseen), SAMPLES), WALKS * len(state.plan.layers)
        runs = _STEPS if _is_risky(state.plan) else _STEPS / 2
        return Cost(
            passes=_A_RUN * runs * min(samples, _FEWER), walks=WALKS * samples, builds=runs + 1, pieces=pieces
        )

    def run(self, state: State, ctx: Context) -> State:
        """Compare layers, then find causes if the verdict is not safe."""
        v = state.verification
        safe = judge_outputs(v.statistics, v.samples, v.held_out).assurance is Assurance.SAFE
        layers = len(state.plan.layers)
        steps = layers if safe else layers + _STEPS
        versions = _versions(state, ctx)
        samples = ctx.samples_of(state.plan)
        chosen = _walked(versions, ctx, samples)
        found = layer_noise(
            versions,
            state.plan,
            state.rounding,
            [samples.take(part) for part in chosen],
            lambda done, _: ctx.progress(self.name, done, steps),
            integers=ctx.target.verifier == ONNXRUNTIME,
        )
        noise = None
        if not safe:
            told = itertools.count(layers + 1)
            noise = _Causes(
                state, ctx, lambda: ctx.progress(self.name, min(next(told), steps - 1), steps)
            ).found()
            ctx.progress(self.name, steps, steps)
        return state.changed(
            diagnosis=Diagnosis(
                samples=sum(map(len, chosen)),
                own=found.own,
                nearest=found.nearest,
                histograms=found.histograms,
                noise=noise,
            )
        )


def _is_risky(plan: Plan) -> bool:
    """Return True if the verdict will probably not be safe."""
    specs = [*plan.weight_specs.values(), *(q.spec for q in plan.activations)]
    return any(spec.bits < _FEW for spec in specs)


def _versions(state: State, ctx: Context) -> Versions:
    written = state.written
    rounded, stands_for = write(state.model, state.plan, state.nearest)
    return Versions(
        infer_shapes(state.executed),
        infer_shapes(ctx.executed(written.marked, written.stands_for)),
        infer_shapes(ctx.executed(rounded, stands_for)),
        written.stands_for,
        stands_for,
    )


def _walked(versions: Versions, ctx: Context, samples: Samples) -> list[NDArray[np.int64]]:
    """Return the samples of each run: few, and no more than fit into memory; at least one run."""
    unseen = ctx.shares.unseen
    size = samples.micro_batch()
    shaped = specialize(versions.exact, samples.two_batches(size))
    most = min(max(SAMPLES, size), size * affordable_batches(shaped, WALKS, ctx.config.max_memory))
    chosen = unseen[spread(len(unseen), most)]
    return list(samples.batches(chosen, size)) or list(samples.batches(unseen, samples.fixed_batch or 1))[:1]


@dataclass(frozen=True)
class _Causes:
    """Measures what causes the noise of the outputs, with versions of the network."""

    state: State
    ctx: Context
    tell: Callable[[], None]

    @cached_property
    def _deviation(self) -> Deviation:
        return self._on(self.ctx.shares.unseen)

    @cached_property
    def _rough(self) -> Deviation:
        return self._deviation.on_fewer(_FEWER)

    def _on(self, indices: NDArray[np.int64]) -> Deviation:
        return Deviation(
            self.state.executed,
            self.ctx.samples_of(self.state.plan),
            indices,
            SAMPLES,
            self.state.calibration.variance,
            self.ctx.config,
            self.ctx.samples_of(self.state.plan).fixed_batch,
        )

    def found(self) -> OutputNoise | None:
        """Return the causes; None if no output can be compared."""
        if not self._deviation.parts:
            return None
        plan = self.state.plan
        read_by = readers(plan, GraphView(self.state.executed))
        total, weights = self._noise(plan), self._noise(only_weights(plan))
        activations = self._noise_of(plan.activation_names, self._deviation)
        loud_weights: dict[str, float] = {}
        loud_activations: dict[str, float] = {}
        # What causes little is not worth a search.
        if weights >= _WORTH * total:
            loud_weights = loudest(
                [x.node for x in plan.layers],
                weights,
                lambda some: self._of(only_weights(plan, set(some)), self._rough),
            )
        if activations >= _WORTH * total:
            loud_activations = loudest(
                list(read_by), activations, lambda some: self._noise_of(some, self._rough)
            )
        return OutputNoise(
            samples=min(SAMPLES, len(self.ctx.shares.unseen)),
            total=total,
            weights=weights,
            activations=activations,
            seen=self._of(plan, self._on(self.ctx.shares.training)) if self.ctx.shares.held_out else None,
            loud_weights=tuple(Loud((node,), share) for node, share in loud_weights.items()),
            loud_activations=tuple(Loud(read_by[name], share) for name, share in loud_activations.items()),
        )

    def _noise_of(self, activations: Sequence[str], deviation: Deviation) -> float:
        self.tell()
        return deviation(*with_activations(self.state, self.ctx, activations))

    def _noise(self, plan: Plan) -> float:
        return self._of(plan, self._deviation)

    def _of(self, plan: Plan, deviation: Deviation) -> float:
        """Return the noise of the network with what a plan quantizes."""
        self.tell()
        marked, stands_for = write(self.state.model, plan, self.state.rounding)
        return deviation(self.ctx.executed(marked, stands_for), stands_for)
