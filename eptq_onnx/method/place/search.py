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
from typing import TypeAlias

import numpy as np
from onnx import ModelProto

from eptq_onnx.errors import ConfigError, ModelError
from eptq_onnx.method.place.network import Chosen, Cut, Quiet, Times, in_ms, reasons
from eptq_onnx.method.place.pieces import between_convolutions
from eptq_onnx.numerics.types import Feeds
from eptq_onnx.placement import Candidate, Placement, TimePoint, Timings, Way
from eptq_onnx.records import Speed
from eptq_onnx.runtimes.pieces import Stopwatch

ALL, FLOAT = "all integers", "float"
_SHORTEST = 1e-3
"""Seconds of one float run below which nothing is chosen, because call overhead would dominate."""
_LITTLE = 0.1
"""Share of the planned model's time that regions must lose on integers for a choice to be worth measuring."""
_LONGEST = 0.05
"""Maximum seconds for the runs of one piece."""
_MARGIN = 1.25
"""Factor on integer kernels in the cautious choice."""
_DOUBT, _MOST_TRIED = 1.1, 2
"""Factor on the planned model's predicted time up to which choices are timed as a whole, and how many."""
_TIE = 1.02
"""Ratio of times that makes no difference between two choices."""
_TRIES, _STEP = 5, 0.98
"""Maximum number of choices timed for the least noise, and how far each limit is below the last."""
_POINTS = 7
"""Times at which the least noise is reported."""
_QUIETER = "float adds less noise here, and the budget of time allows it"
_Found: TypeAlias = tuple[str, tuple[bool, ...], tuple[Candidate, ...], tuple[TimePoint, ...]]
"""Name of a choice, whether each region is on integers, all that were timed, and the front."""


@dataclass(frozen=True)
class TimeGoal:
    """What is chosen, and how long that may take.

    Parameters
    ----------
    limit : float
        Maximum seconds for timing regions alone; a comparison of whole models takes about as long, but at
        least and at most as long as the bench says.
    seconds : float, optional
        Asks for the least noise within this time of one run, instead of the least time.
    """

    limit: float
    seconds: float | None = None


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
    noises : callable
        Returns the noise that each activation quantizer causes alone.
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
    noises: Callable[[], Mapping[str, float]]
    feeds: Feeds
    values: Callable[[Sequence[str]], Feeds]


class Search:
    """Measure one network.

    Parameters
    ----------
    cut : Cut
    bench : Stopwatch
    models : Models
    goal : TimeGoal
    progress : callable
        Called with the number of pieces timed and the total.
    """

    def __init__(
        self,
        cut: Cut,
        bench: Stopwatch,
        models: Models,
        goal: TimeGoal,
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
        """
        cut, bench, models = self._cut, self._bench, self._models
        base = self._compare(models.given)
        quiet = self._goal.seconds is not None
        if base.quantized_seconds < _SHORTEST and not quiet:
            why = f"one float run takes only {base.quantized_seconds * 1e3:.2g} ms, most of it call overhead"
            return self._as_planned(base, why)
        profile = bench.profile(models.exact, models.planned, models.feeds)
        if base.low > 1 and profile.avoidable < _LITTLE and not quiet:
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
        best, chosen, others, front = self._quietest(times, ends) if quiet else self._fastest(times, ends)
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
            kept_float={n: _QUIETER for r in kept for n in r.nodes} if quiet else reasons(timed, kept),
            front=front,
            complete=complete,
        )
        return Timings(cut.digest, placement, pieces, conversions)

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

    def _fastest(self, times: Times, ends: tuple[Candidate, Candidate]) -> _Found:
        """Return the fastest choice."""
        cut, models, planned = self._cut, self._models, self._cut.as_planned
        choices = {
            # In order of names for choices that come out alike.
            "least time": cut.choose(times),
            "least time but for layouts": cut.choose(times, layouts=False),
            "least time with a margin": cut.choose(times, margin=_MARGIN),
            "least time as profiled": cut.choose(replace(times, pieces={}), layouts=False),
        }
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
        faster = [on for on, candidate in tried.items() if candidate.high < 1]
        if faster:
            least = min(tried[on].ratio for on in faster)
            # Of choices that take the same time, the one with most integers makes the smallest file.
            chosen = max((on for on in faster if tried[on].ratio <= _TIE * least), key=sum)
            again = self._compare(models.without(chosen))
            seconds, ratio, low, high = _times(again)
            tried[chosen] = replace(tried[chosen], seconds=seconds, ratio=ratio, low=low, high=high)
            if high < 1:
                return tried[chosen].name, chosen, tuple(tried.values()), ()
        return ALL, planned, tuple(tried.values()), ()

    def _quietest(self, times: Times, ends: tuple[Candidate, Candidate]) -> _Found:
        """Return the choice with the least noise within the time that the goal allows.

        Predicted times are off by some per cent, so the limit of the prediction is moved until the measured
        time keeps within that of the goal.

        Raises
        ------
        ConfigError
            If no choice is fast enough.
        """
        cut, noise = self._cut, self._models.noises()
        goal = wanted = self._goal.seconds or 0.0
        off = ends[0].predicted / ends[0].seconds or 1.0
        tried: list[Candidate] = []
        for _ in range(_TRIES):
            choice = cut.choose(times, quiet=Quiet(noise, off * wanted))
            if choice is None:
                break
            tried.append(self._timed(f"least noise within {in_ms(wanted)}", choice))
            if tried[-1].seconds <= goal:
                front = self._front(times, ends, noise, off)
                return tried[-1].name, choice.on_integers, tuple(tried), front
            wanted *= _STEP * goal / tried[-1].seconds
        least = min(c.seconds for c in (*ends[:1], *tried))
        raise ConfigError(
            f"option budget=time={goal:g} cannot be met: the fastest choice that was timed takes {least:.3g} "
            "s on this machine; give more."
        )

    def _front(
        self, times: Times, ends: tuple[Candidate, Candidate], noise: Mapping[str, float], off: float
    ) -> tuple[TimePoint, ...]:
        """Return the least noise at times between that of the fastest choice and that of the float model."""
        fastest = self._cut.choose(times)
        first = fastest.predicted if fastest is not None else ends[0].predicted
        found: dict[tuple[bool, ...], TimePoint] = {}
        for seconds in np.linspace(1.001 * first, max(ends[1].predicted, first), _POINTS):
            choice = self._cut.choose(times, quiet=Quiet(noise, float(seconds)))
            if choice is not None:
                found[choice.on_integers] = TimePoint(
                    choice.predicted / off, choice.noise, sum(choice.on_integers)
                )
        return tuple(sorted(found.values(), key=lambda point: point.seconds))

    def _compare(self, other: ModelProto) -> Speed:
        """Time a whole model in turn with the planned one."""
        return self._bench.compare(self._models.planned, other, self._models.feeds, self._limit)

    def _timed(self, name: str, choice: Chosen) -> Candidate:
        """Time a choice as a whole model, and measure its noise."""
        models = self._models
        speed = self._compare(models.without(choice.on_integers))
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
