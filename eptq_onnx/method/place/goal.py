"""What a choice of placement and widths is for, and what counts beside time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from eptq_onnx.program import BYTES, NOISE, TIME, Program

_WORDS = {TIME: "time", NOISE: "noise", BYTES: "bytes"}


@dataclass(frozen=True)
class Goal:
    """What is chosen, and how long that may take.

    Parameters
    ----------
    limit : float
        Maximum seconds for timing regions alone; a comparison of whole models takes about as long, but at
        least and at most as long as the bench says.
    minimized : str
        Currency that is minimized: ``time``, ``noise`` or ``bytes``.
    limits : dict of str to float
        Currency to its limit: seconds of one run, noise of weights and activations at the outputs as a share
        of their power, bytes of the file.
    others : dict of str to float
        Currency to its limit, for those that count weights on integers alone.
    most_slower : float, optional
        The limits give way where they would make the model slower than the fastest choice by more than this
        factor. By default they never do.
    """

    limit: float
    minimized: str = TIME
    limits: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, float] = field(default_factory=dict)
    most_slower: float | None = None

    @property
    def counts_more_than_time(self) -> bool:
        """True if anything is limited or minimized other than the time of the fastest choice."""
        return self.minimized != TIME or bool(self.limits)

    def __str__(self) -> str:
        limits = [_in_words(name, amount) for name, amount in self.limits.items()]
        within = f" within {', '.join(limits)}" if limits else ""
        return f"least {_WORDS[self.minimized]}{within}"


def _in_words(name: str, amount: float) -> str:
    if name == TIME:
        return in_ms(amount)
    return f"{amount:.2%} of noise" if name == NOISE else f"{amount:,.0f} bytes"


def in_ms(seconds: float) -> str:
    """Return a time in milliseconds."""
    return f"{seconds * 1e3:.3g} ms"


@dataclass(frozen=True)
class Parts:
    """What quantizers and weights cost beside time.

    Parameters
    ----------
    noise : dict of str to float
        Activation quantizer to the noise that it causes.
    bytes : dict of str to float
        Activation quantizer to the bytes of its nodes and constants.
    rest : float
        Bytes of the file that no choice changes.
    weights : tuple of str
        Weights whose widths are chosen along with the regions.
    widths : Program, optional
        Its regions are these weights; the widths of each are options for a region on integers, and for one in
        float, which also has the option of float values.
    """

    noise: Mapping[str, float] = field(default_factory=dict)
    bytes: Mapping[str, float] = field(default_factory=dict)
    rest: float = 0.0
    weights: tuple[str, ...] = ()
    widths: Program | None = None


@dataclass(frozen=True)
class Asked:
    """What the integer program is asked for.

    Parameters
    ----------
    minimized : str
        Currency.
    limits : dict of str to float
        Currency to its limit; bytes with those that no choice changes.
    parts : Parts
    exact : bool
        True if weights that could be stored may stay float.
    """

    minimized: str
    limits: Mapping[str, float]
    parts: Parts
    exact: bool = False

    @property
    def program_limits(self) -> dict[str, float]:
        """Return the limits on what is chosen."""
        rest = {BYTES: self.parts.rest}
        return {name: amount - rest.get(name, 0.0) for name, amount in self.limits.items()}
