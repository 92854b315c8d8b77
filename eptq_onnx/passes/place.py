"""Keep nodes in floating point if integers would be slower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from onnx import ModelProto

from eptq_onnx.config import WeightRange
from eptq_onnx.errors import ConfigError, ModelError, OutputError
from eptq_onnx.execute.deviation import Deviation
from eptq_onnx.graph import edit, io
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.method.place.network import Cut
from eptq_onnx.method.place.search import Models, Search, TimeGoal
from eptq_onnx.method.plan import plan as make_plan
from eptq_onnx.method.qdq import write
from eptq_onnx.method.ranges import weight_ranges
from eptq_onnx.numerics.grid import Grid
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.passes.base import (
    Context,
    Pass,
    State,
    deviation_of,
    leave_float,
    with_activations,
    without_equal_steps,
)
from eptq_onnx.placement import Placement, Timings
from eptq_onnx.proto import store
from eptq_onnx.records import Plan, Rounding
from eptq_onnx.runtime import Session
from eptq_onnx.runtimes import timings
from eptq_onnx.runtimes.pieces import Stopwatch
from eptq_onnx.targets import ONNXRUNTIME

_SHARE = 0.1
"""Time limit of timing regions, as a share of the expected run."""


class Place(Pass):
    """Keep nodes in floating point if integers would be slower.

    See `eptq_onnx.method.place`.
    """

    name = "place"
    requires = ("calibration",)
    provides = ("plan", "calibration", "left_float", "float_nodes", "placement")
    repeats = True

    bench: ClassVar[Callable[[int], Stopwatch]] = Stopwatch
    """Factory of the object that times models, given the number of threads."""

    def enabled(self, ctx: Context) -> bool:
        """Return True if the options ask for a choice by time."""
        return ctx.config.chooses_by_time

    def run(self, state: State, ctx: Context) -> State:
        """Measure or read timings, and replan with regions that are slower on integers left float."""
        left = "which operators run on integers was not chosen by time"
        if ctx.target.verifier != ONNXRUNTIME:
            return state.noting(f"{left}: {ctx.target.name} is for a runtime other than onnxruntime")
        if (name := without_equal_steps(state.plan)) is not None:
            return state.noting(f"{left}: onnxruntime has no kernels for {name}")
        if store.folder_of(state.model) is not None:
            return state.noting(f"{left}: the float and the quantized model together need too much memory")
        timed = _Timed(state, ctx, type(self).bench(ctx.config.runtime_threads))
        try:
            placement = timed.placement()
        except ModelError as e:
            return state.noting(f"{left}: {e}")
        after = leave_float(state, ctx, {}, placement.kept_float).changed(placement=placement)
        return after.noting(*timed.notes)


class _Timed:
    """Measurements of one network, from a file or new.

    Parameters
    ----------
    state : State
    ctx : Context
    bench : Stopwatch
    """

    def __init__(self, state: State, ctx: Context, bench: Stopwatch) -> None:
        self._state, self._ctx, self._bench = state, ctx, bench
        # Times do not depend on the scales.
        config = ctx.config.model_copy(update={"weight_range": WeightRange.MINMAX})
        self._nearest: Rounding = weight_ranges(
            state.executed, state.plan, state.calibration, state.scores, config, ()
        )
        batches = ctx.samples.two_batches(ctx.samples.fixed_batch or 1)
        self._feeds: Feeds = batches[0]
        self._planned = self._written(state.plan)
        exact, written = (specialize(m, batches) for m in (state.executed, self._planned))
        self._cut = Cut(exact, written, state.plan)
        seconds = ctx.config.seconds
        self._digest = self._cut.digest if seconds is None else f"{self._cut.digest} within {seconds!r} s"
        self.notes: list[str] = []

    def placement(self) -> Placement:
        """Return the placement, from the timings file if it exists.

        Raises
        ------
        ModelError
            If a whole model cannot be timed.
        ConfigError
            If the timings file that the user named cannot be used.
        OutputError
            If it cannot be written.
        """
        bench, digest, given = self._bench, self._digest, self._ctx.config.timings
        if given is not None:
            known = timings.read(given, digest, bench.threads)
            if known is None:
                timings.write(given, known := self._search())
            return self._told(known)
        path = timings.cached(digest, bench.runtime, bench.machine, bench.threads)
        try:
            known = timings.read(path, digest, bench.threads)
        except ConfigError as e:
            self.notes.append(f"measured again: {e}")
            known = None
        if known is None:
            self._keep(path, known := self._search())
        return self._told(known)

    def _told(self, found: Timings) -> Placement:
        if not found.placement.complete:
            self.notes.append(
                f"{found.placement.untimed} regions were timed in whole models only, because timing regions "
                "may take a tenth of the run"
            )
        return found.placement

    def _keep(self, path: Path, found: Timings) -> None:
        """Write timings to the cache; a run without one gives the same result, and measures again."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            timings.write(path, found)
        except (OSError, OutputError) as e:
            reason = e.strerror or e if isinstance(e, OSError) else e
            self.notes.append(
                f"another run may choose other operators to run on integers, because the cache folder "
                f"{path.parent} cannot be written ({reason}): name a file for the measurements with the "
                "option timings"
            )

    def _search(self) -> Timings:
        ctx = self._ctx
        models = Models(
            given=io.load(ctx.source, ctx.folder),
            exact=self._state.executed,
            planned=self._planned,
            without=self._without,
            noise=self._noise,
            noises=self._noises,
            feeds=self._feeds,
            values=self._values,
        )
        goal = TimeGoal(_SHARE * ctx.expected, ctx.config.seconds)
        found = Search(self._cut, self._bench, models, goal, ctx.tell("place")).timings()
        return replace(found, network=self._digest)

    def _values(self, names: Sequence[str]) -> Feeds:
        if not names:
            return {}
        session = Session(edit.exposing(self._state.executed, names))
        return session.run(session.taken(self._feeds), names)

    def _without(self, chosen: Sequence[bool]) -> ModelProto:
        return self._written(self._plan(chosen))

    def _plan(self, chosen: Sequence[bool]) -> Plan:
        kept = {name: "" for region in self._cut.nodes(chosen) for name in region.nodes}
        state, ctx = self._state, self._ctx
        nodes: Mapping[str, str] = {**state.float_nodes, **kept}
        return make_plan(state.model, ctx.target, ctx.config, state.left_float, nodes)

    def _noise(self, chosen: Sequence[bool]) -> float | None:
        state, ctx, plan = self._state, self._ctx, self._plan(chosen)
        if not self._deviation.parts:
            return None
        calibration = replace(state.calibration, grids=self._grids(plan))
        changed = state.changed(plan=plan, calibration=calibration)
        return self._deviation(*with_activations(changed, ctx, [q.name for q in plan.activations]))

    def _noises(self) -> Mapping[str, float]:
        state, ctx = self._state, self._ctx
        names = [q.name for q in state.plan.activations]
        if not self._deviation.parts:
            return dict.fromkeys(names, 1.0)
        return {name: self._deviation(*with_activations(state, ctx, [name])) for name in names}

    @cached_property
    def _deviation(self) -> Deviation:
        return deviation_of(self._state, self._ctx)

    def _written(self, plan: Plan) -> ModelProto:
        """Return the network that the samples run, quantized by a plan with nearest rounding."""
        marked, stands_for = write(self._state.model, plan, replace(self._nearest, grids=self._grids(plan)))
        return self._ctx.executed(marked, stands_for)

    def _grids(self, plan: Plan) -> dict[str, Grid]:
        """Return the grids of a plan's quantizers.

        If a plan quantizes only some tensors of a group, they keep the group's range here.
        """
        own, grids = self._state.plan.quantizer_of, self._nearest.grids
        return {**grids, **{q.name: grids[own[q.tensors[0]].name] for q in plan.quantizers}}
