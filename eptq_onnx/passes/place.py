"""Keep nodes in floating point where that is faster, or serves the limits better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from onnx import ModelProto

from eptq_onnx.config import FLOAT_BITS, BudgetUnit, Config, Objective, WeightRange
from eptq_onnx.errors import ConfigError, ModelError, OutputError
from eptq_onnx.execute.deviation import Deviation
from eptq_onnx.graph import edit, io
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.method.allocate import program_of as widths_of
from eptq_onnx.method.float_fallback import SAMPLES
from eptq_onnx.method.place.goal import Goal, Parts
from eptq_onnx.method.place.network import Chosen, Cut
from eptq_onnx.method.place.search import Models, Search
from eptq_onnx.method.plan import plan as make_plan
from eptq_onnx.method.qdq import write
from eptq_onnx.method.ranges import weight_ranges
from eptq_onnx.numerics.grid import Grid
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.passes.base import Context, Cost, Pass, State
from eptq_onnx.passes.plans import deviation_of, leave_float, with_activations
from eptq_onnx.passes.trial import Trial, trial
from eptq_onnx.placement import Placement, Timings
from eptq_onnx.program import BYTES, NOISE, TIME
from eptq_onnx.proto import store
from eptq_onnx.records import Plan, Rounding
from eptq_onnx.runtime import Session
from eptq_onnx.runtimes import timings
from eptq_onnx.runtimes.pieces import Stopwatch
from eptq_onnx.targets import ONNXRUNTIME
from eptq_onnx.training.worth import uneven_type
from eptq_onnx.workdir import HashOnly, encode

_MINIMIZED = {Objective.TIME: TIME, Objective.NOISE: NOISE, Objective.BYTES: BYTES}
_SHARE = 0.1
"""Time limit of timing regions, as a share of the expected run."""
_MOST_SLOWER = 1.1
"""How much slower a model may be for noise that no option limits along with its time."""


class Place(Pass):
    """Keep nodes in floating point where that is faster, or serves the limits better.

    Widths of weights are chosen along with it if noise or bytes are limited; the pass `Allocate` then chooses
    them again for the regions that are on integers. See `eptq_onnx.method.place`.
    """

    name = "place"
    requires = ("calibration",)
    provides = ("plan", "calibration", "left_float", "float_nodes", "exact", "placement", "front")
    repeats = True

    bench: ClassVar[Callable[[int], Stopwatch]] = Stopwatch
    """Factory of the object that times models, given the number of threads."""

    def enabled(self, ctx: Context) -> bool:
        """Return True if the options ask for a choice by time."""
        return ctx.config.chooses_by_time

    def cost(self, state: State, ctx: Context) -> Cost:
        """Runs with each quantizer alone, if noise counts."""
        counts = NOISE in _limits(ctx.config) or ctx.config.objective is Objective.NOISE
        return Cost(
            passes=counts * min(len(ctx.shares.scored), SAMPLES) * len(state.plan.activations), share=_SHARE
        )

    def run(self, state: State, ctx: Context) -> State:
        """Measure or read timings, and replan with regions that are slower on integers left float."""
        if not state.plan.integer_layers or not state.plan.activations:
            return state
        left = "which operators run on integers was not chosen by time"
        if ctx.target.verifier != ONNXRUNTIME:
            return state.noting(f"{left}: {ctx.target.name} is for a runtime other than onnxruntime")
        if (name := uneven_type(state.plan)) is not None:
            return state.noting(f"{left}: onnxruntime has no kernels for {name}")
        if store.is_large(state.model):
            return state.noting(f"{left}: the float and the quantized model together need too much memory")
        timed = _Timed(state, ctx, type(self).bench(ctx.config.runtime_threads))
        try:
            placement = timed.placement()
        except ModelError as e:
            return state.noting(f"{left}: {e}")
        exact = {x.node for x in state.plan.layers if x.weight in placement.exact}
        after = leave_float(state, ctx, {}, placement.kept_float, exact)
        return after.changed(placement=placement, front=placement.front).noting(*timed.notes)


def _limits(config: Config) -> dict[str, float]:
    """Return the limits that bear on what runs on integers."""
    sizes = (b.amount for b in config.width_budgets if b.unit is BudgetUnit.BYTES)
    limits = {TIME: config.seconds, NOISE: config.total_noise, BYTES: next(sizes, None)}
    return {name: amount for name, amount in limits.items() if amount is not None}


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
        self._noise_of: dict[tuple[bool, ...], float] = {}
        self._nearest: Rounding = weight_ranges(
            state.executed, state.plan, state.calibration, state.scores, config, ()
        )
        batches = ctx.samples.two_batches(ctx.samples.fixed_batch or 1)
        self._feeds: Feeds = batches[0]
        self._planned = self._written(state.plan)
        exact, written = (specialize(m, batches) for m in (state.executed, self._planned))
        self._cut = Cut(exact, written, state.plan)
        self._goal = Goal(
            _SHARE * ctx.expected,
            _MINIMIZED[config.objective],
            _limits(config),
            {b.unit.value: b.amount for b in config.width_budgets if b.unit is not BudgetUnit.BYTES},
        )
        most = config.activation_noise
        if not self._goal.counts_more_than_time and state.sensitivity.left > most > 0:
            self._goal = replace(self._goal, limits={NOISE: most}, most_slower=_MOST_SLOWER)
        self._digest = self._cut.digest
        if self._goal.counts_more_than_time:
            # What is noisy depends on the samples and on all options.
            samples = encode(ctx.samples.identity, HashOnly())
            self._digest += f" for {self._goal} of {samples} with {ctx.given.digest(ctx.target)}"
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
            parts=self._parts,
            spent=self._spent,
            feeds=self._feeds,
            values=self._values,
        )
        found = Search(self._cut, self._bench, models, self._goal, ctx.tell("place")).timings()
        return replace(found, network=self._digest)

    def _values(self, names: Sequence[str]) -> Feeds:
        if not names:
            return {}
        session = Session(edit.exposing(self._state.executed, names))
        return session.run(session.taken(self._feeds), names)

    def _without(self, chosen: Sequence[bool]) -> ModelProto:
        return self._written(self._plan(chosen))

    def _plan(self, chosen: Sequence[bool], exact: Sequence[str] = ()) -> Plan:
        kept = {name: "" for region in self._cut.nodes(chosen) for name in region.nodes}
        state, ctx = self._state, self._ctx
        nodes: Mapping[str, str] = {**state.float_nodes, **kept}
        around = state.exact | {x.node for x in state.plan.layers if x.weight in exact}
        return make_plan(state.model, ctx.target, ctx.config, state.left_float, nodes, around, state.dynamic)

    def _planned_as(self, chosen: Sequence[bool], exact: Sequence[str] = ()) -> State:
        """Return the state with the plan of a choice."""
        plan = self._plan(chosen, exact)
        calibration = replace(self._state.calibration, grids=self._grids(plan))
        return self._state.changed(plan=plan, calibration=calibration)

    def _noise(self, chosen: Sequence[bool]) -> float | None:
        if not self._deviation.parts:
            return None
        key = tuple(chosen)
        if key not in self._noise_of:
            state = self._planned_as(chosen)
            names = state.plan.activation_names
            self._noise_of[key] = self._deviation(*with_activations(state, self._ctx, names))
        return self._noise_of[key]

    def _spent(self, choice: Chosen) -> dict[str, float]:
        """Return the noise and the bytes of a choice with its widths, of those that are limited."""
        limits, found = self._goal.limits, dict[str, float]()
        if NOISE in limits:
            effects = self._state.effects
            weights = sum(effects[name].effects[bits] for name, bits in choice.widths.items())
            found[NOISE] = (self._noise(choice.on_integers) or 0.0) + weights
        if BYTES in limits:
            state = self._planned_as(choice.on_integers, choice.exact)
            found[BYTES] = trial(state, self._ctx, state.plan).count.bytes(choice.widths)
        return found

    def _parts(self) -> Parts:
        """Return what quantizers and weights cost beside time."""
        state, config = self._state, self._ctx.config
        counts = NOISE in self._goal.limits or self._goal.minimized == NOISE
        noise = self._noises() if counts else {}
        if not config.chooses_widths:
            return Parts(noise)
        whole = trial(state, self._ctx, state.plan)
        sizes, quantizers = whole.count.sizes({}), whole.of_quantizers()
        mean = self._goal.others.get(BudgetUnit.WEIGHTS.value, 0.0)
        return Parts(
            noise,
            quantizers,
            sizes.rest - sum(quantizers.values()),
            tuple(state.effects),
            widths_of(state.effects, sizes, whole.in_float(state.model, self._stored()), mean),
        )

    def _stored(self) -> Trial | None:
        """Return the trial file in which all layers compute in float on stored weights; None if none can."""
        state, ctx = self._state, self._ctx
        config = ctx.config.model_copy(update={"activation_bits": FLOAT_BITS, "bits": ()})
        try:
            plan = make_plan(state.model, ctx.target, config, exact=state.exact)
        except ModelError:
            return None
        return trial(state, ctx, plan)

    def _noises(self) -> dict[str, float]:
        """Return the noise of each quantizer, so that all add up to what they cause together."""
        state, ctx = self._state, self._ctx
        names = [q.name for q in state.plan.activations]
        if not self._deviation.parts:
            return dict.fromkeys(names, 1.0)
        if self._goal.most_slower is None:
            alone = {name: self._deviation(*with_activations(state, ctx, [name])) for name in names}
        else:
            alone = {name: state.sensitivity.others.get(name, 0.0) for name in names}
        together = self._noise(self._cut.as_planned) or 0.0
        if ranged := [q.name for q in state.plan.dynamic]:
            # Dynamic layers stay as they are, whatever is chosen.
            together = max(together - self._deviation(*with_activations(state, ctx, ranged)), 0.0)
        return {name: noise * together / max(sum(alone.values()), 1e-30) for name, noise in alone.items()}

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
