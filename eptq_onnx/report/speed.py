"""The measured speed in words."""

from __future__ import annotations

from eptq_onnx.outcome import OperatorTime, Pace, Speed
from eptq_onnx.report.sheet import Sheet

_NAMED, _SMALL = 3, 0.05
"""Most operators to name, and their smallest share of the total increase in run time."""
_WIDE = 1.25
"""Ratio of an interval's ends above which its middle says too much."""
_BUSY = 2.0
"""Ratio of an interval's ends from which on other work must have disturbed the measurements."""
_SHOWN = 0.02
"""Smallest share of the run time of an operator in the table."""


def pace_in_words(speed: Speed) -> str:
    """Return ``2.00× faster``, ``1.60 to 2.50× faster`` for a wide interval, ``level`` or ``not told apart``.

    A factor is told only where the whole interval of the ratio is on one side.
    """
    if speed.pace is Pace.SAME:
        return "not told apart" if speed.high / speed.low > _WIDE else "level"
    faster = speed.pace is Pace.FASTER
    low, high = (1 / speed.high, 1 / speed.low) if faster else (speed.low, speed.high)
    factor = (
        f"{low:.2f} to {high:.2f}"
        if high / low > _WIDE
        else f"{1 / speed.ratio if faster else speed.ratio:.2f}"
    )
    return f"{factor}× {speed.pace.value}"


def in_words(speed: Speed | None) -> str:
    """Return one line such as ``1.60× faster than the float model: 1.11 ms → 0.66 ms (…)``."""
    if speed is None:
        return "not measured"
    batch = f"per run of {speed.samples} sample{'s' * (speed.samples > 1)}"
    times = f"{time_text(speed.float_seconds)} → {time_text(speed.quantized_seconds)} {batch}"
    interval = (
        f"its time is {speed.low:.2f} to {speed.high:.2f} of the float model's, "
        f"in {speed.pairs} pairs of measurements on this machine"
    )
    if speed.high / speed.low > _BUSY:
        interval += "; it was busy, so measure again with eptq-onnx bench"
    pace = pace_in_words(speed)
    beside = {"level": "level with", "not told apart": "not told apart from"}.get(pace, f"{pace} than")
    return f"{beside} the float model: {times} ({interval})"


def warning(speed: Speed | None) -> str:
    """Return a warning for a model that runs slower; empty for others."""
    if speed is None or speed.pace is not Pace.SLOWER:
        return ""
    named = ", ".join(_cost(o, speed) for o in costly(speed))
    cause = f"; the time goes to {named}" if named else ""
    return f"runs {pace_in_words(speed)} than the float model on this machine{cause}"


def costly(speed: Speed) -> list[OperatorTime]:
    """Return the operators that take longer than in the float model, largest increase first."""
    grown = [o for o in speed.operators if o.quantized_seconds > o.float_seconds]
    lost = sum(o.quantized_seconds - o.float_seconds for o in grown)
    return [o for o in grown if o.quantized_seconds - o.float_seconds >= _SMALL * lost][:_NAMED]


def named_operators(speed: Speed) -> list[OperatorTime]:
    """Return the operators that take more than next to nothing in either model."""
    most = max(
        sum(o.float_seconds for o in speed.operators), sum(o.quantized_seconds for o in speed.operators)
    )
    return [o for o in speed.operators if max(o.float_seconds, o.quantized_seconds) >= _SHOWN * most]


def operator_sheet(speed: Speed, runtime: str = "onnxruntime") -> Sheet:
    """Return a table of both models' time by operator, without operators that take next to nothing."""
    return Sheet(
        f"Time of one run, by the profiler of {runtime}",
        ("operator", "float", "quantized"),
        tuple(
            (o.operator, time_text(o.float_seconds), time_text(o.quantized_seconds))
            for o in named_operators(speed)
        ),
    )


def _cost(operator: OperatorTime, speed: Speed) -> str:
    total = sum(o.quantized_seconds for o in speed.operators)
    now, before = time_text(operator.quantized_seconds), time_text(operator.float_seconds)
    was = f"{now} where the float model takes {before}"
    return f"{operator.operator} ({operator.quantized_seconds / max(total, 1e-12):.0%}, {was})"


def time_text(seconds: float) -> str:
    """Return a time with a suitable unit."""
    if seconds <= 0:
        return "none"
    for unit, name in ((1, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e6:.3g} µs"
