"""What a run was expected to take. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

_SHORT = 10
"""Time below which an estimate gives no number, in seconds."""


@dataclass(frozen=True)
class Estimate:
    """What a run was expected to take before it started.

    Parameters
    ----------
    seconds : float
        Upper estimate: the optimization may end early.
    steps : int
        Most steps of the network-wise optimization.
    shares : dict of str to float
        Seconds of each step whose cost is known, in the order of the run.
    """

    seconds: float
    steps: int
    shares: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        steps = f", at most {self.steps} optimization steps" if self.steps else ", no optimization steps"
        for unit, name in ((3600, "hours"), (60, "minutes"), (1, "seconds")):
            if self.seconds >= max(2 * unit, _SHORT):
                return f"about {self.seconds / unit:.0f} {name}{steps}"
        return f"less than {_SHORT} seconds{steps}"
