"""Records of a search for a file that keeps a score. Pure data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Attempt:
    """A file that was scored.

    Parameters
    ----------
    what : str
        What it is.
    score, drop : float
        Its score, and how much worse than the float model's it is; below 0 if it is better.
    passed : bool
        True if that is within the limit.
    spared : int
        Parts that have more bits than asked for, or stay float.
    bits, exclude : tuple of str
        What spares them, as the options of the same names.
    noise : float or None
        Noise of the outputs that is foreseen, as a share of that of the file as asked for.
    bytes : int
    seconds : float
        Time that it took to make and to score.
    """

    what: str
    score: float
    drop: float
    passed: bool
    spared: int
    bits: tuple[str, ...]
    exclude: tuple[str, ...]
    noise: float | None
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Trail:
    """What was scored on the way to the written file.

    Parameters
    ----------
    float_score : float
    higher_is_better : bool
    max_drop : str
        The limit as it was given, such as ``0.005`` or ``1%``; empty if there was none.
    most : float or None
        The same, in the unit of the score.
    attempts : tuple of Attempt
        In the order in which they were scored.
    chosen : int
        Place of the written file among them.
    computed_by : str
        What ran the quantized models.
    unavailable : tuple of str
        What could not be done as in production, and why.
    """

    float_score: float
    higher_is_better: bool
    max_drop: str
    most: float | None
    attempts: tuple[Attempt, ...]
    chosen: int
    computed_by: str
    unavailable: tuple[str, ...] = ()

    @property
    def written(self) -> Attempt:
        """Return the attempt that was written."""
        return self.attempts[self.chosen]

    @property
    def reached(self) -> bool:
        """Return True unless there is a limit that the written file misses."""
        return self.written.passed

    @property
    def evaluations(self) -> int:
        """Return how often the function that scores was called."""
        return 1 + len(self.attempts)
