"""Find the best choice within limits of time, noise and bytes.

Predicted times are off by some per cent, the noise of quantizers does not quite add up, and weights of one
width share tables in the file. So what the integer program finds is measured, and the limits of the program
are moved until the measured amounts keep within those of the goal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np

from eptq_onnx.errors import ConfigError
from eptq_onnx.method.place.goal import Asked, Goal, Parts
from eptq_onnx.method.place.network import EXACT, VARIANTS, Chosen, Cut, Times, Variant
from eptq_onnx.placement import Candidate, FrontPoint
from eptq_onnx.program import BYTES, NOISE, TIME
from eptq_onnx.program import EXACT as FLOATS

_TRIES, _STEP = 5, 0.98
"""Maximum number of choices measured for one result, and how far each limit is below the last."""
_MOST_TRIED = 2
"""Maximum number of choices that are timed as a whole for the least time."""
_POINTS = 7
"""Times at which the least noise is reported, if no widths are chosen."""
_TIMES, _SIZES = 4, 4
"""Times and sizes at which it is reported if widths are chosen, too."""


class Found(NamedTuple):
    """A choice.

    Parameters
    ----------
    name : str
    on_integers : tuple of bool
        True for each region on integers.
    others : tuple of Candidate
        All that were timed.
    front : tuple of FrontPoint
    exact : tuple of str
        Weights that stay float.
    """

    name: str
    on_integers: tuple[bool, ...]
    others: tuple[Candidate, ...]
    front: tuple[FrontPoint, ...] = ()
    exact: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measures:
    """How choices are measured.

    Parameters
    ----------
    timed : callable
        Times a choice as a whole model, given its name.
    spent : callable
        Returns the noise and the bytes of a choice, of those that are limited.
    parts : Parts
    """

    timed: Callable[[str, Chosen], Candidate]
    spent: Callable[[Chosen], Mapping[str, float]]
    parts: Parts


class Limited:
    """Choices within the limits of a goal.

    Parameters
    ----------
    cut : Cut
    times : Times
    goal : Goal
    measures : Measures
    off : float
        Predicted time of a model divided by its measured time.
    """

    def __init__(self, cut: Cut, times: Times, goal: Goal, measures: Measures, off: float = 1.0) -> None:
        self._cut, self._times, self._goal, self._measures, self._off = cut, times, goal, measures, off or 1.0
        limits = {name: amount * self._unit(name) for name, amount in {**goal.others, **goal.limits}.items()}
        self._asked = Asked(goal.minimized, limits, measures.parts)

    def _unit(self, currency: str) -> float:
        return self._off if currency == TIME else 1.0

    @property
    def keeps_plan(self) -> bool:
        """True if the plan keeps within the limits of noise and bytes."""
        return self._fitting(self._asked, fixed=self._cut.as_planned) is not None

    def fastest(self) -> dict[tuple[bool, ...], Candidate]:
        """Return the fastest choices beside the plan, each timed as a whole model."""
        names: dict[tuple[bool, ...], tuple[str, Chosen]] = {}
        for name, variant in VARIANTS.items():
            choice = self._fitting(self._asked, variant)
            if choice is not None and choice.on_integers != self._cut.as_planned:
                names.setdefault(choice.on_integers, (name, choice))
        likely = []
        for on, (name, choice) in names.items():
            foreseen = self._cut.choose(self._times, fixed=on)
            likely.append((choice.predicted if foreseen is None else foreseen.predicted, name, choice))
        likely.sort(key=lambda found: found[0])
        return {
            choice.on_integers: self._measures.timed(name, replace(choice, predicted=seconds))
            for seconds, name, choice in likely[:_MOST_TRIED]
        }

    def quietest(self, seconds: float) -> Chosen | None:
        """Return the fastest choice within the limits, or if it takes too long, the quietest that does not.

        Parameters
        ----------
        seconds : float
            Predicted time of one run that is not too long.
        """
        choice = self._fitting(self._asked)
        if choice is not None and choice.predicted <= seconds:
            return choice
        return self._cut.choose(self._times, asked=Asked(NOISE, {TIME: seconds}, self._measures.parts))

    def best(self, planned: Candidate) -> Found:
        """Return the choice that minimizes noise or bytes.

        Parameters
        ----------
        planned : Candidate
            The plan.

        Raises
        ------
        ConfigError
            If no choice keeps within the limits.
        """
        asked, tried = self._asked, list[Candidate]()
        for _ in range(_TRIES):
            choice = self._fitting(asked)
            if choice is None:
                break
            tried.append(self._measures.timed(str(self._goal), choice))
            spent = {TIME: tried[-1].seconds}
            if not self._over(spent):
                return Found(tried[-1].name, choice.on_integers, tuple(tried))
            asked = self._tighter(asked, spent)
        raise self.refusal(min(c.seconds for c in (planned, *tried)))

    def _fitting(
        self, asked: Asked, variant: Variant = EXACT, fixed: Sequence[bool] | None = None
    ) -> Chosen | None:
        """Return the best choice whose noise and bytes keep within their limits.

        Weights that could be stored stay float only if there is no other.
        """
        if not asked.exact and asked.parts.widths is not None:
            found = self._found(asked, variant, fixed)
            return found or self._found(replace(asked, exact=True), variant, fixed)
        return self._found(asked, variant, fixed)

    def _found(self, asked: Asked, variant: Variant, fixed: Sequence[bool] | None) -> Chosen | None:
        for _ in range(_TRIES):
            choice = self._cut.choose(self._times, variant, fixed=fixed, asked=asked)
            if choice is None:
                return None
            spent = self._measures.spent(choice)
            if not self._over(spent):
                return choice
            asked = self._tighter(asked, spent)
        return None

    def exact(self, taken: Sequence[bool]) -> tuple[str, ...]:
        """Return the weights that must stay float in a choice: as few elements as possible."""
        if self._asked.parts.widths is None:
            return ()
        found = self._found(self._asked, EXACT, taken)
        if found is None:
            asked = replace(self._asked, minimized=FLOATS, exact=True)
            found = self._found(asked, EXACT, taken)
        return () if found is None else found.exact

    def _over(self, spent: Mapping[str, float]) -> list[str]:
        """Return the currencies of which more is spent than the goal allows."""
        return [name for name, limit in self._goal.limits.items() if spent.get(name, 0.0) > limit]

    def _tighter(self, asked: Asked, spent: Mapping[str, float]) -> Asked:
        """Return a question whose limits are lower by what was spent too much."""
        limits = dict(asked.limits)
        for name in self._over(spent):
            goal = self._goal.limits[name]
            if name == BYTES:
                limits[name] -= spent[name] - goal
            else:
                limits[name] *= _STEP * goal / spent[name]
        return replace(asked, limits=limits)

    def refusal(self, fastest: float) -> ConfigError:
        """Return the error for the first limit that no choice meets alone, or for all together.

        Parameters
        ----------
        fastest : float
            Seconds of the fastest choice that was timed.
        """
        goal = self._goal
        for name, limit in goal.limits.items():
            asked = replace(self._asked, minimized=name, limits={}, exact=True)
            choice = self._cut.choose(self._times, asked=asked)
            least = 0.0 if choice is None else choice.totals.get(name, 0.0) / self._unit(name)
            alone = len(goal.limits) == 1
            if name == TIME and (least > limit or alone):
                return ConfigError(
                    f"option budget=time={limit:g} cannot be met: the fastest choice that was timed takes "
                    f"{fastest:.3g} s on this machine; give more."
                )
            if name == BYTES and (least > limit or alone):
                return ConfigError(
                    f"option budget=bytes={limit:.15g} cannot be met: the smallest file takes about "
                    f"bytes={least:.0f}; give at least that."
                )
            if name == NOISE and (least > limit or alone):
                return ConfigError(
                    f"option max_noise={limit:g} cannot be met: the most exact choice causes noise of about "
                    f"{least:.2g} of the outputs' power; give more."
                )
        names = {TIME: "budget=time", BYTES: "budget=bytes", NOISE: "max_noise"}
        given = ", ".join(f"{names[name]}={limit:.15g}" for name, limit in goal.limits.items())
        return ConfigError(f"the limits {given} cannot be met together: raise one of them.")

    def front(self, taken: tuple[bool, ...], slowest: float) -> tuple[FrontPoint, ...]:
        """Return the least noise at several times, and at several sizes if widths are chosen.

        Parameters
        ----------
        taken : tuple of bool
            The choice that was taken, which is one of the points.
        slowest : float
            Predicted seconds of the float model.
        """
        fastest, smallest, quietest = map(self._least, (TIME, BYTES, NOISE))
        chooses = self._measures.parts.widths is not None
        first = slowest if fastest is None else fastest.predicted
        times = np.linspace(1.001 * first, max(slowest, first), _TIMES if chooses else _POINTS)
        sizes: list[float | None] = [None]
        if chooses and smallest is not None and quietest is not None:
            ends = smallest.totals[BYTES], quietest.totals[BYTES]
            sizes = [float(size) for size in np.geomspace(*ends, _SIZES)]
        found: dict[tuple[tuple[bool, ...], tuple[int, ...]], FrontPoint] = {}
        for seconds, size in product(times, sizes):
            limits = {TIME: float(seconds), **({} if size is None else {BYTES: size}), **self._goal.others}
            asked = Asked(NOISE, limits, self._measures.parts)
            choice = self._cut.choose(self._times, asked=asked)
            if choice is not None:
                found[choice.on_integers, tuple(choice.widths.values())] = self._point(choice)
        limits = {name: amount for name, amount in self._asked.limits.items() if name != TIME}
        asked = Asked(NOISE, limits, self._measures.parts)
        choice = self._cut.choose(self._times, fixed=taken, asked=asked)
        if choice is not None:
            point = replace(self._point(choice), chosen=True)
            found[choice.on_integers, tuple(choice.widths.values())] = point
        return tuple(sorted(found.values(), key=lambda p: (p.seconds or 0.0, p.bytes or 0, -p.noise)))

    def _least(self, currency: str) -> Chosen | None:
        asked = Asked(currency, self._goal.others, self._measures.parts)
        return self._cut.choose(self._times, asked=asked)

    def _point(self, choice: Chosen) -> FrontPoint:
        parts = self._measures.parts
        bits = list(choice.widths.items())
        sizes = self._cut.sizes
        total = sum(sizes[name] for name, _ in bits)
        return FrontPoint(
            noise=choice.totals.get(NOISE, 0.0),
            seconds=choice.predicted / self._off,
            regions=sum(choice.on_integers),
            bytes=None if parts.widths is None else round(choice.totals[BYTES]),
            bits=None if not total else sum(sizes[name] * width for name, width in bits) / total,
        )
