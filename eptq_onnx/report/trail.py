"""The scores on the way to a file, as texts and a table."""

from __future__ import annotations

import shlex

from eptq_onnx.report.plain import size_text
from eptq_onnx.report.sheet import Sheet
from eptq_onnx.trail import Attempt, Trail

_NAMED = 3
"""Options of an attempt that are shown; the JSON report has all."""


def in_words(trail: Trail) -> str:
    """Return the score of the written file in one line."""
    written = trail.written
    limit = f", at most {trail.max_drop} is allowed" if trail.max_drop else ""
    spared = f"; {written.spared} parts spared" if written.spared else ""
    return (
        f"{written.score:.5g}, float {trail.float_score:.5g}: {_worse(written.drop)}{limit}{spared}; "
        f"{trail.evaluations} evaluations by {trail.computed_by}"
    )


def warning(trail: Trail | None) -> str:
    """Return what to say before all else if the limit is missed; else an empty text."""
    if trail is None or trail.reached:
        return ""
    written = trail.written
    return (
        f"the score misses its limit: {written.score:.5g} is {_worse(written.drop)} than the float model's "
        f"{trail.float_score:.5g}, and {trail.max_drop} is allowed; {trail.evaluations} evaluations found "
        "nothing better"
    )


def trail_sheet(trail: Trail) -> Sheet:
    """Return the table of all files that were scored."""
    rows = []
    for k, a in enumerate(trail.attempts):
        what = f"{a.what} (written)" if k == trail.chosen else a.what
        passed = "-" if trail.most is None else "yes" if a.passed else "no"
        rows.append(
            (what, f"{a.score:.5g}", f"{a.drop:.3g}", passed, str(a.spared), size_text(a.bytes), _options(a))
        )
    return Sheet(
        "Files that were scored",
        ("file", "score", "worse by", "within the limit", "parts spared", "size", "by"),
        tuple(rows),
        names=(6,),
        alarming=frozenset() if trail.reached else frozenset({trail.chosen}),
    )


def _options(attempt: Attempt) -> str:
    words = [("--bits", b) for b in attempt.bits] + [("--exclude", e) for e in attempt.exclude]
    shown = " ".join(shlex.join(pair) for pair in words[:_NAMED])
    return f"{shown} and {len(words) - _NAMED} more" if len(words) > _NAMED else shown


def _worse(drop: float) -> str:
    return f"{drop:.3g} worse" if drop > 0 else f"{-drop:.3g} better" if drop < 0 else "the same"
