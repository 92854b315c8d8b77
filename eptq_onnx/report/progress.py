"""Estimate the remaining time of a run, from the expected time of each step and the progress so far."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_HALF = 0.07
"""Share of a step after which its own pace has half the weight.

The first units take longer than the others, or are too few.
"""

_MOST = 20.0
"""Largest correction: a step expected to take no time gives no information."""


@dataclass
class _Current:
    """The running step."""

    name: str
    began: float
    done: float = 0.0
    total: float = 1.0

    @property
    def share(self) -> float:
        return min(1.0, max(0.0, self.done / self.total)) if self.total > 0 else 0.0


class Remaining:
    """Remaining time of a run.

    A step has an expected time, or none if the estimate does not include it. A running step is extrapolated
    from its own pace, with a weight that grows with its progress. The rest of it, and the steps to come, take
    their expected time, corrected by how much longer the finished steps took than expected; the correction
    grows with their share of the run. A skipped step stops counting once a later one begins.

    Parameters
    ----------
    clock : callable, optional
        Returns seconds.
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
        """Set the expected times of the steps to come, in seconds, in order."""
        self._expected = {name: max(0.0, float(value)) for name, value in seconds.items()}
        self._pending = list(self._expected)
        self._ended = self._clock()

    def update(self, step: str, done: float, total: float) -> None:
        """Report the progress of a step, in any unit."""
        now = self._clock()
        if self._current is None or self._current.name != step:
            self._finish(now)
            # The first report of a step comes after its first unit, so it began when the previous step ended.
            self._current = _Current(step, now if self._ended is None else self._ended)
            if step in self._pending:
                self._pending = self._pending[self._pending.index(step) + 1 :]
        self._current.done, self._current.total = done, total
        if done >= total:
            self._finish(now)

    @property
    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return self._clock() - self._began

    def seconds(self) -> float | None:
        """Return the remaining seconds, or None if there is nothing to estimate them from."""
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
        """Return how much longer steps take than expected.

        The load of the machine affects all steps, while other errors do not, so the ratio is damped.
        """
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
            # The optimization may end early, which says nothing about its pace.
            self._foreseen += self._expected[current.name] * current.share
