"""Find the fastest choice: time the planned model first, then its regions, then whole models.

Most plans need few measurements. If integers are clearly faster than float, and no region takes notably
longer on integers than in float, the plan stands. Otherwise the regions are timed alone, those that look slow
first, and the choices that follow from the times run as whole models in turn with the planned one. The
smallest of several measured ratios is too small on average, so the fastest choice is measured again, and is
taken only if it is faster in that measurement too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from onnx import ModelProto

from eptq_onnx.errors import ModelError
from eptq_onnx.method.place.goal import Goal, Parts
from eptq_onnx.method.place.limits import Found, Limited, Measures
from eptq_onnx.method.place.network import VARIANTS, Chosen, Cut, Times
from eptq_onnx.method.place.pieces import between_convolutions
from eptq_onnx.method.place.reasons import reasons
from eptq_onnx.method.place.regions import Region
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.outcome import Speed
from eptq_onnx.placement import Candidate, Placement, TimedRegion, Timings, Way
from eptq_onnx.program import TIME
from eptq_onnx.runtimes.pieces import Stopwatch

ALL, FLOAT, QUIETER = "all integers", "float", "less noise for little time"
_SHORTEST = 1e-3
"""Seconds of one float run below which nothing is chosen, because call overhead would dominate."""
_LITTLE = 0.1
"""Share of the planned model's time that regions must lose on integers for a choice to be worth measuring."""
_LONGEST = 0.05
"""Maximum seconds for the runs of one piece."""
_DOUBT, _MOST_TRIED = 1.1, 2
"""Factor on the planned model's predicted time up to which choices are timed as a whole, and how many."""
_TRIES = 4
"""Maximum number of choices for less noise that are timed as a whole."""
_TIE = 1.02
"""Ratio of times that makes no difference between two choices."""
_FASTER = 1.05
"""How many times as fast as the float model a choice must stay for which limits give way."""


@dataclass(frozen=True)
class Models:
    """What is timed.

    Parameters
    ----------
    given : ModelProto
        The float model as the user gave it.
    exact : ModelProto
        The normalized float model, whose nodes have the names of the plan.
    planned : ModelProto
        The same, quantized by the plan.
    without : callable
        Returns the model of a choice, given whether each region is on integers.
    noise : callable
        Returns the noise of a choice's activations at the outputs; None if no output can be compared.
    parts : callable
        Returns what quantizers and weights cost beside time.
    spent : callable
        Returns the noise and the bytes of a choice, of those that are limited.
    feeds : dict of str to ndarray
        Inputs of one run.
    values : callable
        Returns the values of some tensors in that run.
    """

    given: ModelProto
    exact: ModelProto
    planned: ModelProto
    without: Callable[[Sequence[bool]], ModelProto]
    noise: Callable[[Sequence[bool]], float | None]
    parts: Callable[[], Parts]
    spent: Callable[[Chosen], Mapping[str, float]]
    feeds: Feeds
    values: Callable[[Sequence[str]], Feeds]


class Search:
    """Measure one network.

    Parameters
    ----------
    cut : Cut
    bench : Stopwatch
    models : Models
    goal : Goal
    progress : callable
        Called with the number of pieces timed and the total.
    """

    def __init__(
        self,
        cut: Cut,
        bench: Stopwatch,
        models: Models,
        goal: Goal,
        progress: Callable[[int, int], None],
    ) -> None:
        self._cut, self._bench, self._models = cut, bench, models
        self._goal, self._limit, self._progress = goal, goal.limit, progress

    def timings(self) -> Timings:
        """Return the choice with its measurements.

        Raises
        ------
        ModelError
            If a whole model cannot be timed.
        ConfigError
            If no choice keeps within the limits.
        """
        cut, bench, models = self._cut, self._bench, self._models
        base = self._compare(models.given)
        limited = self._goal.counts_more_than_time and not self._fast_plan_will_do()
        firm = self._goal.counts_more_than_time and self._goal.most_slower is None
        if base.quantized_seconds < _SHORTEST and not (limited and firm):
            why = f"one float run takes only {base.quantized_seconds * 1e3:.2g} ms, most of it call overhead"
            return self._as_planned(base, why)
        profile = bench.profile(models.exact, models.planned, models.feeds)
        if base.low > 1 and profile.avoidable < _LITTLE and not limited:
            return self._as_planned(base, "no region is notably slower on integers")
        pieces, conversions, complete = self._pieces(seen := cut.seen(profile.regions))
        times = Times(pieces, conversions, seen)
        # Both are fixed; they are predicted only for comparison with their measured times.
        ends = (
            replace(
                _candidate(ALL, cut.choose(times, fixed=cut.as_planned), (base.float_seconds, 1.0, 1.0, 1.0)),
                noise=models.noise(cut.as_planned),
            ),
            replace(
                _candidate(FLOAT, cut.choose(times, fixed=[False] * len(cut.as_planned)), _times(base)),
                noise=0.0,
            ),
        )
        if firm:
            found = self._within(times, ends)
        else:
            found = self._fastest(times, ends)
            found = self._quieter(found, times, ends) if limited else found
        best, chosen, others, front, exact = found
        timed = cut.times(times, chosen)
        kept = cut.nodes(chosen)
        placement = Placement(
            runtime=bench.runtime,
            machine=bench.machine,
            threads=bench.threads,
            chosen=best,
            candidates=(*ends, *others),
            regions=timed,
            untimed=cut.untimed(pieces),
            kept_float=self._reasons(timed, kept),
            exact=exact,
            front=front,
            complete=complete,
        )
        return Timings(cut.digest, placement, pieces, conversions)

    def _fast_plan_will_do(self) -> bool:
        """Return True if time is minimized and the plan keeps within the limits of the goal."""
        untimed = Times({}, {}, [None] * len(self._cut.as_planned))
        return self._goal.minimized == TIME and self._limited(untimed).keeps_plan

    def _limited(self, times: Times, off: float = 1.0) -> Limited:
        return Limited(self._cut, times, self._goal, self._measures, off)

    @cached_property
    def _measures(self) -> Measures:
        return Measures(self._timed, self._models.spent, self._models.parts())

    def _reasons(self, timed: Sequence[TimedRegion], kept: Sequence[Region]) -> dict[str, str]:
        """Return the reason of each node that is kept float."""
        if not self._goal.counts_more_than_time:
            return reasons(timed, kept)
        firm = self._goal.most_slower is None
        why = f"chosen for the {self._goal}" if firm else f"chosen for {QUIETER}"
        found = {name: why for region in kept for name in region.nodes}
        if firm:
            return found
        slower = {t.nodes for t in timed if t.integer_seconds > t.float_seconds}
        return found | reasons(timed, [region for region in kept if region.nodes in slower])

    def _within(self, times: Times, ends: tuple[Candidate, Candidate]) -> Found:
        """Return the best choice within the limits of the goal."""
        limited = self._limited(times, ends[0].predicted / ends[0].seconds)
        fastest = self._goal.minimized == TIME
        found = self._fastest_within(limited, ends[0]) if fastest else limited.best(ends[0])
        return found._replace(
            front=limited.front(found.on_integers, ends[1].predicted), exact=limited.exact(found.on_integers)
        )

    def _fastest_within(self, limited: Limited, planned: Candidate) -> Found:
        """Return the fastest choice within the limits of the goal."""
        tried = limited.fastest()
        if limited.keeps_plan:
            as_planned = Found(ALL, self._cut.as_planned, tuple(tried.values()))
            return self._faster_twice(tried) or as_planned
        if not tried:
            raise limited.refusal(planned.seconds)
        chosen = min(tried, key=lambda on: tried[on].ratio)
        return Found(tried[chosen].name, chosen, tuple(tried.values()))

    def _quieter(self, found: Found, times: Times, ends: tuple[Candidate, Candidate]) -> Found:
        """Return a quieter choice that is not much slower than what was found, if there is one."""
        own = next((c for c in found.others if c.name == found.name), ends[0])
        foreseen = self._cut.choose(times, fixed=found.on_integers)
        most = min((self._goal.most_slower or 1.0) * own.ratio, ends[1].ratio / _FASTER)
        if foreseen is None or most <= own.ratio:
            return found
        tried, allowed = list(found.others), most
        slow: tuple[Chosen, ModelProto] | None = None
        for _ in range(_TRIES):
            if slow is not None:
                known, times = times, self._corrected(times, *slow)
                if times == known:
                    allowed = (allowed + own.ratio) / 2
            limited = self._limited(times, ends[0].predicted / ends[0].seconds)
            choice = limited.quietest(foreseen.predicted * allowed / own.ratio)
            if choice is None or choice.on_integers == found.on_integers:
                break
            slow = choice, self._models.without(choice.on_integers)
            tried.append(self._timed(QUIETER, *slow))
            if tried[-1].ratio <= most:
                return Found(tried[-1].name, choice.on_integers, tuple(tried))
        return found._replace(others=tuple(tried))

    def _corrected(self, times: Times, choice: Chosen, other: ModelProto) -> Times:
        """Return times that explain why a choice takes longer than predicted, from its model's profile."""
        models = self._models
        profile = self._bench.profile(models.exact, other, models.feeds)
        return self._cut.corrected(times, choice.on_integers, profile.regions)

    def _as_planned(self, base: Speed, why: str) -> Timings:
        count = sum(self._cut.as_planned)
        candidates = (
            Candidate(ALL, count, 0.0, base.float_seconds, 1.0, 1.0, 1.0),
            Candidate(FLOAT, 0, 0.0, *_times(base)),
        )
        bench = self._bench
        placement = Placement(
            bench.runtime, bench.machine, bench.threads, ALL, candidates, (), count, why=why
        )
        return Timings(self._cut.digest, placement)

    def _fastest(self, times: Times, ends: tuple[Candidate, Candidate]) -> Found:
        """Return the fastest choice."""
        cut, planned = self._cut, self._cut.as_planned
        choices = {name: cut.choose(times, variant) for name, variant in VARIANTS.items()}
        names = {c.on_integers: name for name, c in reversed(choices.items()) if c is not None}
        foreseen = [(name, cut.choose(times, fixed=on)) for on, name in names.items() if on != planned]
        # Predictions ignore interactions, so those that look a little slower are tried, too.
        most = _DOUBT * ends[0].predicted
        likely = [(c, name) for name, c in foreseen if c is not None and c.predicted <= most]
        likely = sorted(likely, key=lambda pair: pair[0].predicted)[:_MOST_TRIED]
        # This choice rests on whole models alone, and is tried whatever the times of regions predict.
        kinds = cut.choose(times, fixed=cut.faster_kinds(times.seen))
        others = {planned, *(c.on_integers for c, _ in likely)}
        if kinds is not None and kinds.on_integers not in others and cut.has_layers(kinds.on_integers):
            likely.append((kinds, "float where operators are slower"))
        tried = {c.on_integers: self._timed(name, c) for c, name in likely}
        return self._faster_twice(tried) or Found(ALL, planned, tuple(tried.values()))

    def _faster_twice(self, tried: dict[tuple[bool, ...], Candidate]) -> Found | None:
        """Return the fastest choice if it is faster than the planned model in a second comparison, too."""
        faster = [on for on, candidate in tried.items() if candidate.high < 1]
        if not faster:
            return None
        least = min(tried[on].ratio for on in faster)
        # Of choices that take the same time, the one with most integers makes the smallest file.
        chosen = max((on for on in faster if tried[on].ratio <= _TIE * least), key=sum)
        again = self._compare(self._models.without(chosen))
        seconds, ratio, low, high = _times(again)
        tried[chosen] = replace(tried[chosen], seconds=seconds, ratio=ratio, low=low, high=high)
        return Found(tried[chosen].name, chosen, tuple(tried.values())) if high < 1 else None

    def _compare(self, other: ModelProto) -> Speed:
        """Time a whole model in turn with the planned one."""
        return self._bench.compare(self._models.planned, other, self._models.feeds, self._limit)

    def _timed(self, name: str, choice: Chosen, other: ModelProto | None = None) -> Candidate:
        """Time a choice as a whole model, which is made if it is not there, and measure its noise."""
        models = self._models
        speed = self._compare(models.without(choice.on_integers) if other is None else other)
        return replace(_candidate(name, choice, _times(speed)), noise=models.noise(choice.on_integers))

    def _pieces(
        self, seen: Sequence[tuple[float, float] | None]
    ) -> tuple[dict[str, tuple[Way, ...]], dict[str, dict[str, float]], bool]:
        """Time each distinct conversion and piece once, until the time limit.

        Returns the ways, the conversions, and whether nothing is missing.
        """
        cut, bench = self._cut, self._bench
        ways: dict[str, tuple[Way, ...]] = {}
        conversions: dict[str, dict[str, float]] = {}
        pieces = {p.key: p for p in cut.in_order(seen)}
        tensors = {p.key: p for p in cut.conversions.values()}
        total = len(pieces) + len(tensors)
        if not total:
            return ways, conversions, True
        each = min(_LONGEST, self._limit / (2 * total))
        known = self._models.values(cut.given)
        began, done = bench.now(), 0
        for key, piece in tensors.items():
            if bench.now() - began > self._limit / 2:
                break
            conversions[key] = bench.conversions(piece.model, each)
            self._progress(done := done + 1, total)
        for key, piece in pieces.items():
            if bench.now() - began > self._limit:
                break
            try:
                ways[key] = bench.ways(piece.model, between_convolutions, each, known)
            except ModelError:
                ways[key] = ()
            self._progress(done := done + 1, total)
        return ways, conversions, done == total


def _times(speed: Speed) -> tuple[float, float, float, float]:
    return speed.quantized_seconds, speed.ratio, speed.low, speed.high


def _candidate(name: str, choice: Chosen | None, times: tuple[float, float, float, float]) -> Candidate:
    regions = sum(choice.on_integers) if choice is not None else 0
    return Candidate(name, regions, choice.predicted if choice is not None else 0.0, *times)
