"""Choose the bits of weights so that the file takes no more bytes than allowed.

An integer program needs costs that add up, but weights of one width share tables and nodes. So costs are
corrected until they are right for the chosen widths, and what is left over goes to single weights. If there
are few choices, all are counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

from eptq_onnx.errors import ConfigError
from eptq_onnx.graph.file_count import FileCount, FileSizes, Widths

Choose = Callable[[FileSizes, "int | None"], dict[str, int]]
"""Returns the best widths for costs that add up and a limit of bytes, if there is one.

It raises ConfigError if there are none.
"""
_ROUNDS = 8
"""Maximum number of corrections; the widths mostly stay the same after two or three."""
_MOST_TRIED = 2048
"""Number of choices up to which all are counted: few weights share costs in ways that corrections miss."""
_SLACK = 4096
"""Bytes by which raising a weight may cost less than its values: the tables of its width may go."""


def fit_bytes(
    choose: Choose,
    effects: Mapping[str, Mapping[int, float]],
    count: FileCount,
    limit: int,
    keeps: Callable[[Widths], bool] = lambda _: True,
) -> dict[str, int]:
    """Return widths whose file takes at most ``limit`` bytes, none of which could be higher.

    Parameters
    ----------
    choose : callable
        See `Choose`.
    effects : mapping of str to mapping of int to float
        Weight to candidate width to the noise that it causes.
    count : FileCount
    limit : int
        In bytes.
    keeps : callable
        Returns whether widths keep within the limits other than that of bytes.

    Raises
    ------
    ConfigError
        If no choice fits.
    """
    if math.prod(len(of) for of in effects.values()) <= _MOST_TRIED:
        return _best_of_all(effects, count, limit, keeps)
    fitting: list[dict[str, int]] = []
    refusal: ConfigError | None = None
    widths: dict[str, int] = {}
    allowed, seen = limit, list[dict[str, int]]()
    for _ in range(_ROUNDS):
        try:
            widths = choose(count.sizes(widths), allowed)
        except ConfigError as e:
            refusal = e
            break
        over = count.bytes(widths) - limit
        if over <= 0:
            fitting.append(widths)
        if widths in seen:
            if over <= 0:
                break
            # Costs are right for these widths, but those it wavers between are not.
            allowed -= over
        seen.append(widths)
    if not fitting:
        fitting = [_smallest(effects, count, limit)]
        if refusal is not None and not keeps(fitting[0]):
            raise refusal
    best = min(fitting, key=lambda found: _noise(effects, found))
    return _raised(effects, best, count, limit, keeps)


def _best_of_all(
    effects: Mapping[str, Mapping[int, float]],
    count: FileCount,
    limit: int,
    keeps: Callable[[Widths], bool],
) -> dict[str, int]:
    """Return the best of all widths, each counted."""
    every = [dict(zip(effects, bits, strict=True)) for bits in itertools.product(*effects.values())]
    fitting = [widths for widths in every if keeps(widths) and count.bytes(widths) <= limit]
    if not fitting:
        least = min(map(count.bytes, filter(keeps, every)), default=None)
        raise ConfigError(
            "the limits on the widths of weights cannot be met: raise one of them."
            if least is None
            else _too_small(limit, least)
        )
    return min(fitting, key=lambda widths: (_noise(effects, widths), count.bytes(widths)))


def _too_small(limit: int, least: int) -> str:
    what = f"option budget=bytes={limit} cannot be met"
    return f"{what}: the smallest file takes bytes={least}; give at least that."


def smallest_file(choose: Choose, count: FileCount, limit: int | None) -> dict[str, int]:
    """Return the widths with the fewest bytes.

    Parameters
    ----------
    choose : callable
        Returns the widths with the fewest bytes for costs that add up.
    count : FileCount
    limit : int, optional
        In bytes.

    Raises
    ------
    ConfigError
        If the file takes more than ``limit`` bytes, or from ``choose``.
    """
    seen: list[dict[str, int]] = []
    widths: dict[str, int] = {}
    for _ in range(_ROUNDS):
        widths = choose(count.sizes(widths), None)
        if widths in seen:
            break
        seen.append(widths)
    best = min(seen, key=count.bytes)
    if limit is not None and count.bytes(best) > limit:
        raise ConfigError(
            f"option budget=bytes={limit} cannot be met: the smallest file within the other limits takes "
            f"bytes={count.bytes(best)}; give at least that, or raise max_noise."
        )
    return best


def _noise(effects: Mapping[str, Mapping[int, float]], widths: Widths) -> float:
    return sum(effects[name][bits] for name, bits in widths.items())


def _smallest(effects: Mapping[str, Mapping[int, float]], count: FileCount, limit: int) -> dict[str, int]:
    """Return the widths of the smallest file.

    Raises
    ------
    ConfigError
        If even that takes more than ``limit`` bytes.
    """
    parts = count.sizes({}).weights
    least = {name: min(of, key=lambda bits: parts[name][bits]) for name, of in effects.items()}
    # Few weights may take more bytes with nodes that unpack them than without.
    widths = {bits for of in effects.values() for bits in of}
    uniform = ({n: bits if bits in of else max(of) for n, of in effects.items()} for bits in widths)
    found = min((least, *uniform), key=count.bytes)
    if count.bytes(found) > limit:
        raise ConfigError(_too_small(limit, count.bytes(found)))
    return found


def _raised(
    effects: Mapping[str, Mapping[int, float]],
    widths: dict[str, int],
    count: FileCount,
    limit: int,
    keeps: Callable[[Widths], bool],
) -> dict[str, int]:
    """Raise single widths as long as one fits and lowers the noise, those that lower it most first."""
    while True:
        steps = [
            (of[bits] - of[widths[name]], name, bits)
            for name, of in effects.items()
            for bits in of
            if bits > widths[name] and of[bits] < of[widths[name]]
        ]
        parts, taken = count.sizes(widths), count.bytes(widths)
        for _, name, bits in sorted(steps):
            more = parts.weights[name][bits] - parts.weights[name][widths[name]]
            raised = {**widths, name: bits}
            if taken + more - _SLACK <= limit and keeps(raised) and count.bytes(raised) <= limit:
                widths = raised
                break
        else:
            return widths
