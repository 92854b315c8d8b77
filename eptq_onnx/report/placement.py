"""The choice by time as tables."""

from __future__ import annotations

from collections import defaultdict

from eptq_onnx.placement import Candidate, Placement, TimedRegion
from eptq_onnx.report.sheet import Sheet


def in_words(placement: Placement) -> str:
    """Return one line such as ``least time: 12 of 178 regions on integers, 1.9× as fast as all integers``."""
    first, taken = placement.candidates[0], placement.taken
    if placement.why:
        return f"{first.name}: {placement.why} in {_where(placement)}"
    if taken is None or taken is first:
        return f"{first.name}: no other choice is faster in {_where(placement)}"
    return (
        f"{taken.name}: {taken.regions} of {first.regions} regions on integers, "
        f"{1 / taken.ratio:.2f}× as fast as {first.name} in {_where(placement)}"
    )


def sheets(placement: Placement) -> list[Sheet]:
    """Return the tables of whole models, and of regions by operator if any were timed."""
    return [
        _candidate_sheet(placement),
        *([_operator_sheet(placement)] if placement.regions else []),
    ]


def _candidate_sheet(placement: Placement) -> Sheet:
    """Return the table of the choices that were timed as whole models."""
    rows = []
    for c in placement.candidates:
        name = f"{c.name} (chosen)" if c.name == placement.chosen else c.name
        beside = "-" if c is placement.candidates[0] else _beside(c)
        rows.append((name, str(c.regions), _ms(c.predicted), _ms(c.seconds), beside, _share(c.noise)))
    return Sheet(
        "Integers or float, by time of one run",
        (
            "choice",
            "regions on integers",
            "predicted",
            "measured",
            "relative to all integers",
            "noise of activations",
        ),
        tuple(rows),
    )


def _operator_sheet(placement: Placement) -> Sheet:
    """Return the table of kernel times by operator."""
    kinds: dict[str, list[TimedRegion]] = defaultdict(list)
    for region in placement.regions:
        kinds[region.operators].append(region)
    return Sheet(
        "Time of kernels, without conversions",
        ("operators", "regions", "on integers", "float", "integers"),
        tuple(
            (
                kind,
                str(len(own)),
                str(sum(r.on_integers for r in own)),
                _ms(sum(r.float_seconds for r in own)),
                _ms(sum(r.integer_seconds for r in own)),
            )
            for kind, own in sorted(kinds.items(), key=lambda item: -sum(r.float_seconds for r in item[1]))
        ),
    )


def _where(placement: Placement) -> str:
    return f"{placement.runtime}, {placement.threads} thread{'s' * (placement.threads > 1)}"


def _beside(c: Candidate) -> str:
    return f"{c.ratio:.2f}× the time ({c.low:.2f} to {c.high:.2f})"


def _share(noise: float | None) -> str:
    return "-" if noise is None else f"{noise:.2%}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds else "-"
