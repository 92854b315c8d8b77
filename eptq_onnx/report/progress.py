"""How long a run still takes: the estimate of each step, corrected by what the steps take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_HALF = 0.07
"""Share of a step after which its own pace counts half: the first units take longer than the others, or are
too few to tell."""

_MOST = 20.0
"""Largest correction: a step that should have taken no time tells nothing."""


@dataclass
class _Current:
    """The step that runs."""

    name: str
    began: float
    done: float = 0.0
    total: float = 1.0

    @property
    def share(self) -> float:
        return min(1.0, max(0.0, self.done / self.total)) if self.total > 0 else 0.0


class Remaining:
    """The time that is left of a run.

    A step has an expected time, or none where the estimate does not know it. A step that runs is extrapolated
    from its own pace, the more the further it is; before that, and for the steps to come, the expected time
    counts, times how much longer the finished steps took than expected, the more of the run they were. A step
    that is skipped counts no more as soon as a later one begins.

    Parameters
    ----------
    clock : callable, optional
        Gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._expected: dict[str, float] = {}
        self._pending: list[str] = []
        self._current: _Current | None = None
        self._ended: float | None = None
        self._spent = self._foreseen = 0.0

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Take the expected times of the steps to come, in seconds, in order."""
        self._expected = {name: max(0.0, float(value)) for name, value in seconds.items()}
        self._pending = list(self._expected)
        self._ended = self._clock()

    def update(self, step: str, done: float, total: float) -> None:
        """Take note of how far a step is, in any unit."""
        now = self._clock()
        if self._current is None or self._current.name != step:
            self._finish(now)
            # Its first report comes when its first unit is done.
            self._current = _Current(step, now if self._ended is None else self._ended)
            if step in self._pending:
                self._pending = self._pending[self._pending.index(step) + 1 :]
        self._current.done, self._current.total = done, total
        if done >= total:
            self._finish(now)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began

    def seconds(self) -> float | None:
        """Seconds that are left, or None if there is nothing to tell them from."""
        now = self._clock()
        factor = self._factor()
        left = factor * sum(self._expected[name] for name in self._pending)
        current = self._current
        if current is None:
            return left if self._expected else None
        expected = factor * self._expected.get(current.name, 0.0)
        if not expected and not current.share:
            return left if self._expected else None
        passed, share = max(0.0, now - current.began), current.share
        own = passed * (1 - share) / share if share else 0.0
        planned = max(0.0, expected - passed) if not share else expected * (1 - share)
        weight = share / (share + _HALF) * (1 + _HALF)
        return left + weight * own + (1 - weight) * planned

    def _factor(self) -> float:
        """How much longer steps take than expected: the load of the machine is common to all, other errors
        are not."""
        if not self._foreseen or not self._spent:
            return 1.0
        current = self._expected.get(self._current.name, 0.0) if self._current is not None else 0.0
        ahead = current + sum(self._expected[name] for name in self._pending)
        ratio = min(_MOST, max(1 / _MOST, self._spent / self._foreseen))
        return float(ratio ** math.sqrt(self._foreseen / (self._foreseen + ahead)))

    def _finish(self, now: float) -> None:
        current, self._current = self._current, None
        if current is None:
            return
        self._ended = now
        if current.name in self._expected:
            self._spent += now - current.began
            # The optimization may end early, which says nothing of the pace.
            self._foreseen += self._expected[current.name] * current.share
