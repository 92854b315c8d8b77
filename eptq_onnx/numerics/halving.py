"""Measure many parts one by one, or in groups that are halved. Pure Python."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import TypeVar

Part = TypeVar("Part")

Group = tuple[float, int, int]
"""The noise of neighbours, the place of the first, and that behind the last."""


def halves(group: Group, noise: Callable[[int, int], float]) -> list[Group]:
    """Return both halves of a group of at least two.

    Noise is about additive: where the first half causes the lesser part, the other is not measured. A small
    remainder may be anything, though, since noise does not quite add up, least of all where it is large.

    Parameters
    ----------
    group : Group
    noise : callable
        Returns the noise of the members from one place to another.
    """
    own, begin, end = group
    middle = (begin + end) // 2
    first = noise(begin, middle)
    rest = own - first
    return [(first, begin, middle), (rest if rest >= first else noise(middle, end), middle, end)]


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
