"""How the jobs of a batch have ended. Pure data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How a job has ended.

    Parameters
    ----------
    name, model : str
    error : str
        Why there is no result; empty if there is one.
    output, verdict : str
        The quantized model, and what to expect of it.
    sqnr_db : float or None
        Least signal-to-noise ratio of an output; None where outputs are equal, or were not compared.
    bytes, float_bytes : int
        Sizes of the files.
    ratio : float or None
        Time of a run divided by that of the float model, if it was measured.
    pace : str
        The same in words, such as ``2.00× faster`` or ``level``; empty if it was not measured.
    seconds : float
        What the job took.
    options : dict of str to object
        Those in which the jobs differ.
    best : bool
        True if no other job of the model has a smaller file and as little noise, or less noise in as small a
        file.
    """

    name: str
    model: str
    error: str = ""
    output: str = ""
    verdict: str = ""
    sqnr_db: float | None = None
    bytes: int = 0
    float_bytes: int = 0
    ratio: float | None = None
    pace: str = ""
    seconds: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    best: bool = False

    @property
    def quality(self) -> float:
        """The ratio, for comparison."""
        return math.inf if self.sqnr_db is None else self.sqnr_db


def fronts(ended: Sequence[Ended]) -> list[Ended]:
    """Return the jobs with ``best`` set, those of each model together, smallest files first.

    Jobs that failed come last.
    """
    fine = [e for e in ended if not e.error]
    models = list(dict.fromkeys(e.model for e in ended))

    def beaten(one: Ended) -> bool:
        return any(
            o.model == one.model
            and o.bytes <= one.bytes
            and o.quality >= one.quality
            and (o.bytes, o.quality) != (one.bytes, one.quality)
            for o in fine
        )

    marked = [replace(e, best=not e.error and not beaten(e)) for e in ended]
    return sorted(marked, key=lambda e: (bool(e.error), models.index(e.model), e.bytes, -e.quality, e.name))


def differing(ended: Sequence[Ended]) -> list[str]:
    """Return the options in which jobs differ."""
    names = dict.fromkeys(name for e in ended for name in e.options)
    return [n for n in names if len({json.dumps(e.options.get(n), default=str) for e in ended}) > 1]
