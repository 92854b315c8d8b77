"""Keep nodes in floating point if integers would be slower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from onnx import ModelProto

from eptq_onnx.config import Objective
from eptq_onnx.errors import ModelError, OutputError
from eptq_onnx.graph import edit, io
from eptq_onnx.graph.shapes import specialize
from eptq_onnx.method.place.network import Chosen, Cut, reasons
from eptq_onnx.method.place.pieces import between_convolutions
from eptq_onnx.method.plan import plan as make_plan
from eptq_onnx.method.qdq import write
from eptq_onnx.method.ranges import weight_ranges
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.passes.base import Context, Pass, State, leave_float
from eptq_onnx.placement import Candidate, Placement, Timings, Way
from eptq_onnx.proto import store
from eptq_onnx.records import Plan, Rounding
from eptq_onnx.runtime import Session
from eptq_onnx.runtimes import timings
from eptq_onnx.runtimes.pieces import Stopwatch
from eptq_onnx.targets import ONNXRUNTIME

_ALL, _FLOAT = "all integers", "float"
_SHORTEST = 1e-3
"""Seconds of one float run below which nothing is chosen, because call overhead would dominate."""
_SHARE, _LEAST = 0.1, 60.0
"""Time limit of timing, as a share of the expected run and in seconds; the larger one counts."""
_LONGEST = 0.05
"""Maximum seconds for the runs of one piece."""


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
        """Return True for ``objective=time``."""
        return ctx.config.objective is Objective.TIME

    def run(self, state: State, ctx: Context) -> State:
        """Measure or read timings, and replan with regions that are slower on integers left float."""
        left = "which operators run on integers was not chosen by time"
        if ctx.target.verifier != ONNXRUNTIME:
            return state.noting(f"{left}: {ctx.target.name} is for a runtime other than onnxruntime")
        if store.folder_of(state.model) is not None:
            return state.noting(f"{left}: the float and the quantized model together need too much memory")
        timed = _Timed(state, ctx, type(self).bench(ctx.config.runtime_threads))
        try:
            placement = timed.placement()
        except ModelError as e:
            return state.noting(f"{left}: {e}")
        after = leave_float(state, ctx, {}, placement.kept_float).changed(placement=placement)
        return after.noting(*placement.notes)


@dataclass
class _Timed:
    """Measurements of one network.

    Parameters
    ----------
    state : State
    ctx : Context
    bench : Stopwatch
    """

    state: State
    ctx: Context
    bench: Stopwatch

    def __post_init__(self) -> None:
        state, ctx = self.state, self.ctx
        self._nearest: Rounding = weight_ranges(
            state.executed, state.plan, state.calibration, state.scores, ctx.config, ()
        )
        self._notes: list[str] = []
        batches = ctx.samples.two_batches(ctx.samples.fixed_batch or 1)
        self._feeds: Feeds = batches[0]
        self._whole = self._written(state.plan)
        exact, written = (specialize(m, batches) for m in (state.executed, self._whole))
        self._cut = Cut(exact, written, state.plan)

    def placement(self) -> Placement:
        """Return the placement, from the timings file if it exists.

        Raises
        ------
        ModelError
            If a whole model cannot be timed.
        ConfigError
            If the timings file cannot be used.
        OutputError
            If it cannot be written.
        """
        threads, digest = self.bench.threads, self._cut.digest
        given = self.ctx.config.timings
        path = given or timings.cached(digest, self.bench.runtime, self.bench.machine, threads)
        known = timings.read(path, digest, threads)
        if known is None:
            known = self._measured(digest)
            self._keep(path, known)
        return known.placement

    def _keep(self, path: Path, found: Timings) -> None:
        if self.ctx.config.timings is None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise OutputError(
                    f"the cache folder {path.parent} cannot be created ({e.strerror or e}): name a file for "
                    "the measurements with the option timings."
                ) from e
        timings.write(path, found)

    def _measured(self, digest: str) -> Timings:
        cut, planned = self._cut, self._cut.as_planned
        whole = self._whole
        base = self.bench.compare(whole, io.load(self.ctx.source, self.ctx.folder), self._feeds)
        fast = base.quantized_seconds < _SHORTEST
        ways: dict[str, tuple[Way, ...]] = {}
        conversions: dict[str, dict[str, float]] = {}
        untimed = 0
        if not fast:
            ways, conversions, untimed = self._pieces()
        # The first two are fixed; they are predicted only for comparison with their measured times.
        found = {
            _ALL: cut.choose(ways, conversions, fixed=planned),
            _FLOAT: cut.choose(ways, conversions, fixed=[False] * len(planned)),
            "least time": None if fast else cut.choose(ways, conversions),
            "least time but for layouts": None if fast else cut.choose(ways, conversions, layouts=False),
        }
        candidates = [
            self._candidate(_ALL, found[_ALL], (base.float_seconds, 1.0, 1.0, 1.0)),
            self._candidate(_FLOAT, found[_FLOAT], (base.quantized_seconds, base.ratio, base.low, base.high)),
        ]
        best, chosen, least = _ALL, planned, 1.0
        tried = {planned}
        for name, choice in found.items():
            if choice is None or name in (_ALL, _FLOAT) or choice.on_integers in tried:
                continue
            tried.add(choice.on_integers)
            speed = self.bench.compare(whole, self._without(choice.on_integers), self._feeds)
            times = speed.quantized_seconds, speed.ratio, speed.low, speed.high
            candidates.append(self._candidate(name, choice, times))
            if speed.high < 1 and speed.ratio < least:
                best, chosen, least = name, choice.on_integers, speed.ratio
        if fast:
            self._notes.append(
                "which operators run on integers was not chosen by time: one float run takes only "
                f"{base.quantized_seconds * 1e3:.2g} ms, most of it call overhead"
            )
        times_of = cut.times(ways, chosen)
        placement = Placement(
            runtime=self.bench.runtime,
            machine=self.bench.machine,
            threads=self.bench.threads,
            chosen=best,
            candidates=tuple(candidates),
            regions=times_of,
            untimed=untimed,
            kept_float=reasons(times_of, cut.nodes(chosen)),
            notes=tuple(self._notes),
        )
        return Timings(digest, placement, ways, conversions)

    def _candidate(
        self, name: str, choice: Chosen | None, times: tuple[float, float, float, float]
    ) -> Candidate:
        regions = sum(choice.on_integers) if choice is not None else 0
        return Candidate(name, regions, choice.predicted if choice is not None else 0.0, *times)

    def _pieces(self) -> tuple[dict[str, tuple[Way, ...]], dict[str, dict[str, float]], int]:
        """Time each distinct piece and conversion once, until the time limit."""
        cut, bench = self._cut, self.bench
        pieces = {p.key: p for p in cut.by_work}
        tensors = {p.key: p for p in cut.conversions.values()}
        budget = max(_LEAST, _SHARE * self.ctx.expected)
        each = min(_LONGEST, budget / (2 * max(1, len(pieces) + len(tensors))))
        began, total = bench.now(), len(pieces) + len(tensors)
        known = self._given()
        ways: dict[str, tuple[Way, ...]] = {}
        conversions: dict[str, dict[str, float]] = {}
        for key, piece in tensors.items():
            if bench.now() - began > budget / 2:
                break
            conversions[key] = bench.conversions(piece.model, each)
            self.ctx.tell("place")(len(conversions), total)
        for key, piece in pieces.items():
            if bench.now() - began > budget:
                break
            try:
                ways[key] = bench.ways(piece.model, between_convolutions, each, known)
            except ModelError:
                ways[key] = ()
            self.ctx.tell("place")(len(conversions) + len(ways), total)
        untimed = sum(
            region.movable and not all(p is not None and ways.get(p.key) for p in pair)
            for region, pair in zip(cut.regions.regions, cut.pieces, strict=True)
        )
        if untimed:
            self._notes.append(
                f"{untimed} regions stay as planned, because they could not be timed, or not within "
                f"{budget:.0f} s"
            )
        return ways, conversions, untimed

    def _given(self) -> Feeds:
        names = self._cut.given
        if not names:
            return {}
        session = Session(edit.exposing(self.state.executed, names))
        return session.run(session.taken(self._feeds), names)

    def _without(self, chosen: Sequence[bool]) -> ModelProto:
        kept = {name: "" for region in self._cut.nodes(chosen) for name in region.nodes}
        state, ctx = self.state, self.ctx
        nodes: Mapping[str, str] = {**state.float_nodes, **kept}
        return self._written(make_plan(state.model, ctx.target, ctx.config, state.left_float, nodes))

    def _written(self, plan: Plan) -> ModelProto:
        """Return the network that the samples run, quantized by a plan with nearest rounding.

        If a plan quantizes only some tensors of a group, they keep the group's range, which does not affect
        times.
        """
        own = self.state.plan.quantizer_of
        grids = {q.name: self._nearest.grids[own[q.tensors[0]].name] for q in plan.quantizers}
        rounding = replace(self._nearest, grids={**self._nearest.grids, **grids})
        marked, stands_for = write(self.state.model, plan, rounding)
        return self.ctx.executed(marked, stands_for)
