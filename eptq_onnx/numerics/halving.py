"""Measure many parts one by one, or in groups that are halved. Pure Python."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import TypeVar

Part = TypeVar("Part")


def alone(pieces: Sequence[Part], noise: Callable[[Sequence[Part]], float], runs: int) -> list[float]:
    """Return the noise of each piece alone, within a number of runs.

    If there are too few of these, the loudest group of neighbours is halved as long as they last, and the
    members of a group that stays whole get equal shares of its noise.
    """
    if len(pieces) <= max(runs, 1):
        return [noise([p]) for p in pieces]
    groups, done = [(-noise(pieces), 0, len(pieces))], 1
    whole: list[tuple[float, int, int]] = []
    while groups and done + 2 <= runs:
        own, begin, end = heapq.heappop(groups)
        if end - begin == 1:
            whole.append((own, begin, end))
            continue
        middle = (begin + end) // 2
        for a, b in ((begin, middle), (middle, end)):
            heapq.heappush(groups, (-noise(pieces[a:b]), a, b))
        done += 2
    found = [0.0] * len(pieces)
    for own, begin, end in (*groups, *whole):
        found[begin:end] = [-own / (end - begin)] * (end - begin)
    return found
